"""Each client's own model: after a round what it keeps over the job, after a stage of its own what that has left.

After the last round a client may go on by itself (`personal.steps`), for its own use: fine-tuning of the common model,
or Ditto's form of it. Li et al., Ditto: Fair and Robust Federated Learning Through Personalization (ICML 2021),
https://arxiv.org/abs/2012.04221

    v_k = argmin F_k(v) + lambda/2 |v - w|^2

Ditto trains v_k beside w in every round, and v_k never feeds w. So it may as well be trained once, after the last round
and from w: of a convex F_k the minimum is the same from any start, and elsewhere this is Ditto with a late start.
"""

from dataclasses import replace
from pathlib import Path

import torch

from fedlora.jobs import Job, start_with
from fedlora.lora import SIDES, LoRA
from fedlora.seeds import derive

from .client_state import ClientState


def own_model(job: Job, folder: Path) -> tuple[Job, LoRA]:
    """The job, and what the client keeps in its folder, of which its model is made after the job's round or stage.

    A client that has not done the stage has the model that it would begin it with.
    """
    before = ClientState(folder).before(job.round + 1)
    if job.stage == "round":
        return job, before
    alone, kept = by_itself(job, before), ClientState(folder, job.stage).of(job.round)
    return replace(alone, trains="".join(s for s in SIDES if kept.side(s))), kept


def by_itself(job: Job, before: LoRA) -> Job:
    """The work of a stage as a client does it alone: from the model that it has, and all that is trained stays.

    `before` is what the rounds have left with the client; who trains alone has nothing of the rounds. Draws and the
    schedule of the learning rate are the stage's own.
    """
    start = job.start if job.stage == "alone" else start_with(job, before)
    if job.resumes:  # the offset is the model; the factors are no more than where training would go on from
        start = replace(start, B={m: torch.zeros_like(b) for m, b in start.B.items()})
    return replace(
        job,
        start=start,
        shares="",
        keeps_rank=0,
        sketch={},
        resumes=False,
        metrics=False,
        stage="round",
        seed=derive(job.seed, job.stage),
        round=0,
        rounds=1,
    )
