"""Collecting updates as they arrive: summed where the strategy needs sums alone, else kept one by one.

No number that a client tells can end a run or take it over: an update without examples, of a change or with a loss that
cannot be is its client's failure, and no single client has more than its share in a mean of three or more.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, inf
from operator import itemgetter

import torch
from torch import Tensor

from fedlora.errors import Failure as Failure
from fedlora.errors import FailureKind, WireError
from fedlora.jobs import Job, PrivacySpent, Update
from fedlora.lora import LoRA, from_matrices
from fedlora.message_types import MOST_LOSS
from fedlora.messages.sketch import scatter_rows
from fedlora.models.optimizer import sum_of_rates
from fedlora.privacy.client_level import ClippedSum
from fedlora.server.refusals import failure_of
from fedlora.server.step_limits import MedianStep, check_norm, update_norm
from fedlora.strategy import Sender

HELD = 32  # updates that are held until they can be judged beside one another
FEWEST_SHARED = 3  # updates from which on none may have more than the largest share: of two, one has half or more
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


@dataclass(frozen=True, kw_only=True)
class UpdateRules:
    """How updates are weighed, and which are refused."""

    uniform: bool = False  # all weigh the same, and not by their examples
    max_share: float = 1.0  # largest share of one update in a mean of three or more; 1/2 or more
    largest_step: float = inf  # norm of a client's change above which it is refused
    step_ratio: float = inf  # the same, over the median of the round

    def weight(self, update: Update) -> float:
        """The weight of an update. Raises `WireError` for one of no examples, which would weigh nothing."""
        if update.examples < 1:
            raise WireError(f"an update is of {update.examples} examples; it takes one or more")
        return 1.0 if self.uniform else float(update.examples)


def capped(weights: Sequence[float], max_share: float) -> list[float]:
    """The weights, the heaviest lowered until it has no larger share than this, which is 1/2 or more.

    Of fewer than three weights none is lowered.

    >>> capped([1000.0, 30.0, 20.0], max_share=0.5)
    [50.0, 30.0, 20.0]
    """
    most = _most_beside(fsum(weights) - max(weights, default=0.0), len(weights), max_share)
    return [min(weight, most) for weight in weights]


def _most_beside(others: float, n: int, max_share: float) -> float:
    """The largest weight of one among `n`, beside the weight of all others."""
    return others * max_share / (1 - max_share) if n >= FEWEST_SHARED and max_share < 1 else inf


class CappedSum:
    """A weighted sum of adapters in which none has more than the largest share.

    The heaviest is kept apart, as its weight is known when all have come: that takes the memory of one adapter more.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share, self._n = max_share, 0
        self._others = WeightedSum()
        self._heaviest: tuple[LoRA, float] | None = None

    def add(self, lora: LoRA, weight: float) -> None:
        """Add an adapter."""
        self._n += 1
        if self._heaviest is None:
            self._heaviest = lora, weight
            return
        lighter, self._heaviest = sorted(((lora, weight), self._heaviest), key=itemgetter(1))
        self._others.add(*lighter)

    def total(self) -> WeightedSum:
        """The sum of all, to which nothing can be added any more."""
        if self._heaviest:
            lora, weight = self._heaviest
            self._others.add(lora, min(weight, _most_beside(self._others.weight, self._n, self._max_share)))
            self._heaviest = None
        return self._others


@dataclass
class Collected:
    """What a round's clients sent back, ready for `aggregate`."""

    updates: list[LoRA] = field(default_factory=list)  # of each client in the order of the jobs, or the one mean of all
    weights: list[float] = field(default_factory=list)  # of the updates
    senders: list[Sender] = field(default_factory=list)  # of the updates; none where the one update is a mean
    each: dict[int, tuple[LoRA, float]] = field(default_factory=dict)  # client -> update, weight; where they are kept
    in_sum: dict[int, float] = field(default_factory=dict)  # client -> its weight in a masked sum that could be read
    answered: int = 0
    failed: dict[int, Failure] = field(default_factory=dict)
    loss: float | None = None  # mean by weight over the clients that tell theirs
    examples: dict[int, int] = field(default_factory=dict)  # client -> those of its update; empty where it is masked
    losses: dict[int, float] = field(default_factory=dict)  # client -> its training loss, where it tells it
    spent: dict[int, PrivacySpent] = field(default_factory=dict)  # client -> what its ledger says


def collect(
    jobs: Mapping[int, Job],
    answers: Answers,
    rules: UpdateRules,
    *,
    sums: bool,
    keep: bool,
    clipped_sum: ClippedSum | None = None,
) -> Collected:
    """Collect the answers to these jobs; with `sums` and without `keep`, few updates are held at a time.

    If `clipped_sum` is given (client-level DP), every update goes there, and none is summed or kept here.
    """
    got = Collected()
    updates = _Updates(got, rules, sums=sums, keep=keep, clipped_sum=clipped_sum)
    for i, answer in answers:
        taken = answer if isinstance(answer, Failure) else failure_of(updates.take, i, jobs[i], answer)
        if isinstance(taken, Failure):
            got.failed[i] = taken
    updates.settle()
    missing = sorted(set(jobs) - updates.weights.keys() - set(got.failed))
    got.failed |= dict.fromkeys(missing, Failure("no answer", FailureKind.LATE))
    for i, failure in got.failed.items():
        log.warning("client %d failed: %s", i, failure.reason)
    updates.write_to(got, order=jobs)
    return got


@dataclass(frozen=True, eq=False)
class _Arrival:
    """An update that is sound by itself."""

    client: int
    job: Job
    update: Update
    lora: LoRA  # the update of a sketch is widened
    step: float  # norm of what the client changed
    weight: float


class _Updates:
    """What is kept of a round's updates: their sum, each of them, or nothing where they go to `clipped_sum`."""

    def __init__(
        self, got: Collected, rules: UpdateRules, *, sums: bool, keep: bool, clipped_sum: ClippedSum | None
    ) -> None:
        self.weights: dict[int, float] = {}
        self._got, self._rules, self._sums, self._keep, self._clipped_sum = got, rules, sums, keep, clipped_sum
        # What one client adds to a clipped sum may not depend on another's update, so nobody is judged beside others.
        self._median = MedianStep(inf if clipped_sum else rules.step_ratio)
        self._hold = HELD if rules.step_ratio < inf and not clipped_sum else 0
        self._held: list[_Arrival] = []
        self._total = CappedSum(rules.max_share)
        self._each: dict[int, LoRA] = {}
        self._senders: dict[int, Sender] = {}

    def take(self, client: int, job: Job, update: Update) -> None:
        """Take in a client's update. Raises `WireError` for one that cannot be."""
        if update.spent:
            self._got.spent[client] = update.spent  # its ledger is charged, whatever becomes of the update
        if update.loss is not None and not abs(update.loss) <= MOST_LOSS:
            raise WireError(f"an update's loss is {update.loss:g}; {MOST_LOSS:g} is the most")
        weight = self._rules.weight(update)
        lora = scatter_rows(job, update.lora)
        step = update_norm(lora, job)
        check_norm(step, self._rules.largest_step)
        self._median.add(step)
        self._held.append(_Arrival(client, job, update, lora, step, weight))
        if len(self._held) > self._hold:
            self.settle()

    def settle(self) -> None:
        """Judge the updates that are held beside all that have come, and take in those that do not go too far."""
        for arrival in self._held:
            if why := self._median.refusal(arrival.step):
                self._got.failed[arrival.client] = Failure(why, FailureKind.REFUSED)
            else:
                self._accept(arrival)
        self._held = []

    def _accept(self, arrival: _Arrival) -> None:
        client, update = arrival.client, arrival.update
        self.weights[client], self._got.examples[client] = arrival.weight, update.examples
        if update.loss is not None:
            self._got.losses[client] = update.loss
        if self._clipped_sum:
            self._clipped_sum.add(arrival.job, arrival.lora)
            return
        if self._sums:
            self._total.add(arrival.lora, arrival.weight)
        if self._keep or not self._sums:
            self._each[client] = arrival.lora
            rates = sum_of_rates(arrival.job, update.examples)
            self._senders[client] = Sender(client, update.examples, update.loss, sum_of_rates=rates)

    def write_to(self, got: Collected, order: Iterable[int]) -> None:
        """Fill in the updates with their weights, in this order of the clients; or their mean alone."""
        got.answered = len(self.weights)
        weights = dict(zip(self.weights, capped([*self.weights.values()], self._rules.max_share), strict=True))
        got.loss = _mean_loss(got.losses, weights)
        for i in order:
            if i in self._each:
                got.each[i] = self._each[i], weights[i]
        if not self._sums:
            got.updates = [lora for lora, _ in got.each.values()]
            got.weights = [weight for _, weight in got.each.values()]
            got.senders = [self._senders[i] for i in got.each]
        elif got.answered and not self._clipped_sum:
            total = self._total.total()
            got.updates, got.weights = [total.mean()], [total.weight]


def _mean_loss(losses: Mapping[int, float], weights: Mapping[int, float]) -> float | None:
    """The weighted mean of the losses that clients tell, the same to the last bit in whatever order they came."""
    if not losses:
        return None
    return fsum(weights[i] * loss for i, loss in losses.items()) / fsum(weights[i] for i in losses)
