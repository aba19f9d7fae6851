"""Clients that do all of a round's work but the training: what they send is as large as what they would send.

A client's job goes through the very code of a run (`JobRunner`), which encodes, masks, keeps and counts; where the
training would be, the sides that the job trains are moved by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedlora.client.policy import ClientPolicy
from fedlora.client.training import Outcome, TrainingTask, begin, end, make_update, start_of
from fedlora.errors import ClientFailed, Failure
from fedlora.jobs import Client, Job, SecAggStep, Update
from fedlora.lora import LoRA, from_matrices
from fedlora.messages.parts import Parts, PartTracker
from fedlora.metrics import Metrics
from fedlora.run.setup import RunSetup
from fedlora.seeds import derive
from fedlora.server.aggregation import Answers
from fedlora.simulations.local_clients import REFUSALS, LocalClients, send

STEP = 1e-3  # standard deviation of what stands for a round's training
Move = Callable[[TrainingTask, LoRA], LoRA]


def at_random(task: TrainingTask, start: LoRA) -> LoRA:
    """The adapter after a training that moved every trained number by chance, and so fills every rank."""
    return _moved(task, start, lambda shape, draw: torch.randn(shape, generator=draw))


def along_one_direction(task: TrainingTask, start: LoRA) -> LoRA:
    """The adapter after a training whose change of every matrix has rank one."""
    return _moved(
        task, start, lambda shape, draw: torch.randn(shape[:1], generator=draw).view(-1, *[1] * (len(shape) - 1))
    )


def _moved(task: TrainingTask, start: LoRA, change: Callable[[torch.Size, torch.Generator], Tensor]) -> LoRA:
    """The adapter with a small change of every matrix that the job trains."""
    job = task.job
    draw = torch.Generator().manual_seed(derive(job.seed, "untrained", task.client, job.round))
    after = (
        (side, module, t + STEP * change(t.shape, draw).to(t.dtype) if side in job.trains else t)
        for side, module, t in start.matrices()
    )
    return from_matrices(after)


class UntrainedFleet:
    """A fleet whose clients are those of a run, and train nothing."""

    def __init__(self, setup: RunSetup, folder: Path, *, examples: int = 0, move: Move = at_random) -> None:
        """`folder` is for what clients keep; `examples` is how many each has, if not as many as its data have."""
        self.traffic = PartTracker()
        self._setup, self._examples, self._move = setup, examples, move
        self._clients = LocalClients(setup.clients_data, setup.ranks, folder, ClientPolicy())
        self._fresh = setup.model.get_adapter()

    def clients(self) -> Sequence[Client]:
        """All clients, with their counts and ranks."""
        return self._known

    @cached_property
    def _known(self) -> list[Client]:
        known, n = self._clients.known, self._examples
        return [replace(client, examples=n, records=n) for client in known] if n else [*known]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Do every job without its training; yield each answer as soon as it is there."""
        parts = Parts()
        for i, job in jobs.items():
            answer = self._answer(i, job, send(self.traffic, parts, i, job))
            if isinstance(answer, Update):
                self.traffic.receive(answer)
            yield i, answer

    def _answer(self, client: int, job: Job, digest: str) -> Update | Failure:
        runner = self._clients.runner(client)
        try:
            with closing(runner.steps(self._setup.model, job, digest)) as steps:
                task = begin(steps)
                return task if isinstance(task, Update) else end(steps, self._outcome(task))
        except REFUSALS as e:
            return Failure.because_of(e)

    def _outcome(self, task: TrainingTask) -> Outcome:
        try:
            task.refuse_empty()
        except ClientFailed as e:
            return e
        start, taken = start_of(task.job, task.kept)
        lora = self._move(task, start.over(self._fresh.only("ABH")))
        examples = self._examples or len(task.records or task.examples)
        loss = None if task.job.privacy else 1.0
        return make_update(task.job, lora, taken, examples, loss)

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation; the result is what each says."""
        return self._clients.ask(asks)

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Count what an evaluation sends; the scores are made up."""
        parts = Parts()
        for i, job in jobs.items():
            send(self.traffic, parts, i, job)
        rows = {i: len(self._setup.clients_data[i].heldout_rows) for i in jobs}
        return {i: Metrics(examples=n, targets=n, loss=float(n), correct=0) for i, n in rows.items()}
