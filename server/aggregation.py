"""Collecting updates as they arrive: summed where the strategy needs sums alone, else kept one by one."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum

import torch
from torch import Tensor

from fedlora.errors import Failure as Failure
from fedlora.errors import FailureKind
from fedlora.jobs import Job, PrivacySpent, Update
from fedlora.lora import LoRA, from_matrices
from fedlora.messages.sketch import scatter_rows
from fedlora.privacy.client_level import ClippedSum
from fedlora.strategy import Sender

log = logging.getLogger("fedlora")


Answers = Iterable[tuple[int, Update | Failure]]


class WeightedSum:
    """A weighted sum of adapters, which needs the memory of one of them however many are added.

    The sum is in float64, so that the order in which clients answer leaves no trace in the float32 mean.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._totals: dict[tuple[str, str], tuple[Tensor, torch.dtype]] = {}

    def add(self, lora: LoRA, weight: float) -> None:
        """Add an adapter; one of lower rank than the others is padded with zeros."""
        self.weight += weight
        for s, m, t in lora.matrices():
            zeros = torch.zeros(t.shape, dtype=torch.float64)
            total, dtype = self._totals.get((s, m), (zeros, t.dtype))
            total = _grown(total, t.shape)
            total[tuple(map(slice, t.shape))].add_(t, alpha=weight)
            self._totals[s, m] = total, torch.promote_types(dtype, t.dtype)  # in any order of clients

    def mean(self) -> LoRA:
        """The weighted mean, in float32 or wider."""
        return from_matrices((s, m, self._mean(*total)) for (s, m), total in self._totals.items())

    def _mean(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return (total / self.weight).to(torch.promote_types(dtype, torch.float32))


def _grown(total: Tensor, shape: torch.Size) -> Tensor:
    """The sum padded with zeros to this shape; the sum itself where it is as large."""
    whole = tuple(map(max, total.shape, shape))
    if whole == tuple(total.shape):
        return total
    grown = torch.zeros(whole, dtype=total.dtype)
    grown[tuple(map(slice, total.shape))] = total
    return grown


@dataclass
class Collected:
    """What a round's clients sent back, ready for `aggregate`."""

    updates: list[LoRA] = field(default_factory=list)  # of each client in the order of the jobs, or the one mean of all
    weights: list[float] = field(default_factory=list)  # of the updates
    senders: list[Sender] = field(default_factory=list)  # of the updates; none where the one update is a mean
    each: dict[int, tuple[LoRA, float]] = field(default_factory=dict)  # client -> update, weight; where they are kept
    answered: int = 0
    failed: dict[int, Failure] = field(default_factory=dict)
    loss: float | None = None  # mean by weight over the clients that tell theirs
    spent: dict[int, PrivacySpent] = field(default_factory=dict)  # client -> what its ledger says


def collect(
    jobs: Mapping[int, Job],
    answers: Answers,
    weigh: Callable[[Update], float],
    *,
    sums: bool,
    keep: bool,
    clipped_sum: ClippedSum | None = None,
) -> Collected:
    """Collect the answers to these jobs; with `sums` and without `keep`, no update outlives its turn.

    If `clipped_sum` is given (client-level DP), every update goes there, and none is summed or kept here.
    """
    got, updates, losses = Collected(), _Updates(sums=sums, keep=keep, clipped_sum=clipped_sum), _Losses()
    answered = set[int]()
    for i, answer in answers:
        if isinstance(answer, Failure):
            got.failed[i] = answer
            continue
        weight = weigh(answer)
        answered.add(i)
        updates.add(i, jobs[i], answer, weight)
        losses.add(answer.loss, weight)
        if answer.spent:
            got.spent[i] = answer.spent
    got.answered = len(answered)
    missing = sorted(set(jobs) - answered - set(got.failed))
    got.failed |= dict.fromkeys(missing, Failure("no answer", FailureKind.LATE))
    for i, failure in got.failed.items():
        log.warning("client %d failed: %s", i, failure.reason)
    got.loss = losses.mean()
    updates.write_to(got, order=jobs)
    return got


@dataclass
class _Updates:
    """What is kept of a round's updates: their sum, each of them, or nothing where they go to `clipped_sum`."""

    sums: bool
    keep: bool
    clipped_sum: ClippedSum | None
    total: WeightedSum = field(default_factory=WeightedSum)
    each: dict[int, tuple[LoRA, float]] = field(default_factory=dict)
    senders: dict[int, Sender] = field(default_factory=dict)

    def add(self, client: int, job: Job, update: Update, weight: float) -> None:
        """Take in a client's update; the update of a sketch is widened first."""
        lora = scatter_rows(job, update.lora)
        if self.clipped_sum:
            self.clipped_sum.add(job, lora)
            return
        if self.sums:
            self.total.add(lora, weight)
        if self.keep or not self.sums:
            self.each[client] = lora, weight
            self.senders[client] = Sender(client, update.examples, update.loss)

    def write_to(self, got: Collected, order: Iterable[int]) -> None:
        """Fill in the updates with their weights, in this order of the clients; or their mean alone."""
        for i in order:
            if i in self.each:
                got.each[i] = self.each[i]
        if not self.sums:
            got.updates = [lora for lora, _ in got.each.values()]
            got.weights = [weight for _, weight in got.each.values()]
            got.senders = [self.senders[i] for i in got.each]
        elif got.answered and not self.clipped_sum:
            got.updates, got.weights = [self.total.mean()], [self.total.weight]


class _Losses:
    """The training losses that clients tell; in whatever order they come, their mean is the same to the last bit."""

    def __init__(self) -> None:
        self._weighted: list[float] = []
        self._weights: list[float] = []

    def add(self, loss: float | None, weight: float) -> None:
        """Take in a client's loss; None where the client may not tell it."""
        if loss is not None:
            self._weighted.append(weight * loss)
            self._weights.append(weight)

    def mean(self) -> float | None:
        """The weighted mean; None where no client tells its loss."""
        return fsum(self._weighted) / fsum(self._weights) if self._weights else None
