"""What an audit sees of one private job: every step by what it did to the model, and by whose gradients it took.

A step begins where the mechanism draws its records. What the adapter is then, less what it was at the draw before, is
the noisy sum that the step before followed, whatever the mechanism says of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.encoding.encoder import Example, Records
from fedlora.jobs import Job, Update, shared_start
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.privacy.dpsgd import Mechanism

from . import canaries
from .statistics import Counts, Floats

LOOK = 1 << 14  # numbers of a step that are kept, evenly many of each tensor
Tensors = Mapping[tuple[str, str], Tensor]  # (side, module) -> a matrix


@dataclass(frozen=True, eq=False)
class ObservedStep:
    """One step of a job, observed from outside."""

    squares: Mapping[tuple[str, str], tuple[float, int]]  # sum of the squares of the noisy sum, and how many numbers
    numbers: Floats  # the first numbers of each tensor of the noisy sum
    times: Counts  # how often each record was in the step, (records,)


@dataclass(frozen=True, kw_only=True)
class AnswerAgain:
    """What a client did when it was asked a job that it had answered."""

    same: bool  # is the answer the same bit for bit?
    steps: int  # that it trained
    charges: int  # that it was charged besides


@dataclass(frozen=True, eq=False)
class ObservedRound:
    """One client's round, observed from outside."""

    client: int
    job: Job
    answer: Update
    sums: Tensors  # sum of the noisy gradient sums of all steps
    visible: Tensors  # the part of them that the server can see
    steps: Sequence[ObservedStep]
    dropout_seed: int
    epsilon: float  # by its ledger, after the round
    again: AnswerAgain | None = None  # where the job was asked a second time

    @property
    def name(self) -> str:
        """How findings call this round."""
        return f"client {self.client}, round {self.job.round + 1}"

    @property
    def times(self) -> Counts:
        """How often each record was in each step, (steps, records)."""
        return np.stack([step.times for step in self.steps])

    @cached_property
    def visible_vector(self) -> Floats:
        """All numbers of `visible` in the places of `sums`, with zeros for those that the server does not see."""
        return as_vector({key: _in_place(self.visible.get(key), t) for key, t in self.sums.items()})


@dataclass(eq=False)
class StepObserver:
    """Observes the steps of one job of one client."""

    model: Model
    job: Job
    records: Records
    unit: float  # the noisy sum over the change that it makes
    steps: list[ObservedStep] = field(default_factory=list)
    after: LoRA = field(default_factory=LoRA)  # the client's adapter when the job is done
    dropout_seed: int = 0  # of torch's generator, which dropout draws from, when the first step begins

    def on(self, mechanism: Mechanism, where: NDArray[np.int64]) -> Mechanism:
        """Return the mechanism under observation; its engine knows canaries at these places."""
        self._number = {id(e): i for i, record in enumerate(self.records) for e in record}
        self._times = np.zeros(len(self.records), dtype=np.int64)
        self._before: LoRA | None = None
        self._read: Callable[[], LoRA] = self.model.get_adapter

        def draw(numbers: Any, n: int, rate: float) -> list[int]:
            self._begin()
            return mechanism.draw(numbers, n, rate)

        return replace(
            mechanism,
            draw=draw,
            engine=canaries.engine(mechanism, self.job, where, self._see),
            rows=canaries.rows(mechanism, self.job, where, self.records, self._see),
            watch=self._watch,
        )

    def _watch(self, read: Callable[[], LoRA]) -> None:
        self._read = read

    def finish(self) -> None:
        """Observe the last step, once the job is done."""
        if self._before is not None:
            self._end()
        self.after = self._read()

    def _begin(self) -> None:
        if self._before is None:
            self.dropout_seed = torch.initial_seed()
        else:
            self._end()
        self._before = self._read()
        self._times = np.zeros(len(self.records), dtype=np.int64)

    def _see(self, examples: Sequence[Example]) -> None:
        for example in examples:
            self._times[self._number[id(example)]] += 1

    def _end(self) -> None:
        assert self._before is not None
        turn = self.job.sides_of(len(self.steps))
        sums = {key: self.unit * t for key, t in moved(self._read(), self._before, turn)}
        most = max(1, LOOK // len(sums))
        first = np.concatenate([t.flatten()[:most].numpy() for t in sums.values()])
        squares = {key: (float((t * t).sum()), t.numel()) for key, t in sums.items()}
        self.steps.append(ObservedStep(squares, first, self._times))


def moved(after: LoRA, before: LoRA, sides: str) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield by how much each matrix of these sides moved, in float64."""
    for s in sides:
        for m, t in after.side(s).items():
            yield (s, m), t.double() - before.side(s)[m].double()


def visible(lora: LoRA, job: Job) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield by how much each shared matrix moved, as far as the server can tell."""
    start = shared_start(job)
    for s in job.shares:
        for m, t in lora.side(s).items():
            was = start.side(s)[m].double()
            if t.shape == was.shape:
                yield (s, m), t.double() - was
            elif s == "A":  # from a client that resumes, which sends [A'; A] and [B', -B]
                yield (s, m), t[: len(t) // 2].double() - t[len(t) // 2 :].double()
            else:
                yield (s, m), t[:, : t.shape[1] // 2].double() + t[:, t.shape[1] // 2 :].double()


def _in_place(seen: Tensor | None, whole: Tensor) -> Tensor:
    """Zeros like the whole matrix, with what is seen of it, its first rows and columns, in place."""
    placed = torch.zeros_like(whole)
    if seen is not None:
        placed[tuple(map(slice, seen.shape))] = seen
    return placed


def as_vector(some: Tensors) -> Floats:
    """Return all numbers as one vector, in the order of sides and modules."""
    return np.concatenate([t.flatten().numpy() for t in some.values()])
