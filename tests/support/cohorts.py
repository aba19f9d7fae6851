"""The same clients trained by themselves and in one pass, for tests that hold one to the other."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedlora.checks.small_models import SmallModel
from fedlora.client import training
from fedlora.client.stacked import cohort, private
from fedlora.client.training import Trained, TrainingTask
from fedlora.jobs import Job
from fedlora.lora import LoRA, average, map_factors
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from tests.support.float64 import in_float64

NOTHING = LoRA()
Train = Callable[[SmallModel, Sequence[TrainingTask]], list[Trained]]


def double(lora: LoRA) -> LoRA:
    return map_factors(lambda t: t.double(), lora)


def filled(lora: LoRA, seed: int) -> LoRA:
    """The adapter in float64 with other numbers in its B, as if it had been trained."""
    g = torch.Generator().manual_seed(seed)
    return double(LoRA(lora.A, {m: torch.randn(b.shape, generator=g) / 4 for m, b in lora.B.items()}, lora.H))


def furthest(one: LoRA, other: LoRA) -> float:
    """The largest difference of two numbers at the same place."""
    assert {(s, m) for s, m, _ in one.matrices()} == {(s, m) for s, m, _ in other.matrices()}
    return max(float((t - other.side(s)[m]).abs().max()) for s, m, t in one.matrices())


def tasks_of(
    small: SmallModel, jobs: Sequence[Job], kept: Sequence[LoRA] = (NOTHING,) * 3, mechanism: Mechanism = STANDARD
) -> list[TrainingTask]:
    """A task of each job, for the first clients of the small model."""
    return [
        TrainingTask(client=i, job=job, kept=own, examples=data.train, records=data.records, mechanism=mechanism)
        for i, (job, own, data) in enumerate(zip(jobs, kept, small.clients, strict=False))
    ]


def one_by_one(small: SmallModel, tasks: Sequence[TrainingTask]) -> list[Trained]:
    return [training.perform(small.model, task) for task in tasks]


def in_one_pass(small: SmallModel, tasks: Sequence[TrainingTask]) -> list[Trained]:
    train = private.train if tasks[0].job.privacy else cohort.train
    return [result for result in train(small.model, tasks) if not isinstance(result, Exception)]


def rounds(small: SmallModel, jobs: Sequence[Job], train: Train, n: int = 3) -> LoRA:
    """The mean adapter after some rounds of clients that do these jobs, and keep what they leave with them."""
    state, kept = double(small.start), [NOTHING] * len(jobs)
    for round in range(n):
        now = [replace(job, start=state, round=round, rounds=n, seed=7) for job in jobs]
        results = train(small, tasks_of(small, now, kept))
        kept = [own for _, own in results]
        state = average([update.lora for update, _ in results], [1.0, 2.0, 3.0]).over(state)
    return state


def compared(small: SmallModel, jobs: Sequence[Job]) -> float:
    """How far apart one round's updates are at most."""
    with in_float64(small.model):
        pairs = zip(one_by_one(small, tasks_of(small, jobs)), in_one_pass(small, tasks_of(small, jobs)), strict=True)
        return max(furthest(one.lora, other.lora) for (one, _), (other, _) in pairs)
