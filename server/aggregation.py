"""Updates as they arrive: summed where a strategy needs no more than sums, kept where it needs each."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum

import torch
from torch import Tensor

from fedlora.errors import Failure as Failure
from fedlora.errors import FailureKind
from fedlora.jobs import Job, Spent, Update
from fedlora.lora import LoRA, from_matrices
from fedlora.messages.sketch import widen

log = logging.getLogger("fedlora")


Answers = Iterable[tuple[int, Update | Failure]]


class Sum:
    """A weighted sum of adapters, as large as one of them however many there are.

    It runs in float64, so that the order in which clients answer leaves no trace in the float32 mean.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._totals: dict[tuple[str, str], tuple[Tensor, torch.dtype]] = {}

    def add(self, lora: LoRA, weight: float) -> None:
        """Take in one adapter; one of lower rank than others counts as if zeros stood where it has nothing."""
        self.weight += weight
        for s, m, t in lora.matrices():
            total, dtype = self._totals.get((s, m), (torch.zeros(t.shape, dtype=torch.float64), t.dtype))
            total = _grown(total, t.shape)
            total[tuple(map(slice, t.shape))].add_(t, alpha=weight)
            self._totals[s, m] = total, torch.promote_types(dtype, t.dtype)  # whoever came first

    def mean(self) -> LoRA:
        """The weighted mean, in float32 or wider."""
        return from_matrices((s, m, self._mean(*total)) for (s, m), total in self._totals.items())

    def _mean(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return (total / self.weight).to(torch.promote_types(dtype, torch.float32))


def _grown(total: Tensor, shape: torch.Size) -> Tensor:
    """The sum with zeros up to this shape; itself where it is as large."""
    whole = tuple(map(max, total.shape, shape))
    if whole == tuple(total.shape):
        return total
    grown = torch.zeros(whole, dtype=total.dtype)
    grown[tuple(map(slice, total.shape))] = total
    return grown


@dataclass
class Gathered:
    """What a round's clients sent back, ready for `aggregate`."""

    updates: list[LoRA] = field(default_factory=list)  # of each client in the order of the jobs, or the one mean of all
    weights: list[float] = field(default_factory=list)
    each: dict[int, tuple[LoRA, float]] = field(
        default_factory=dict
    )  # client -> update and weight, where they are kept
    answered: int = 0
    failed: dict[int, Failure] = field(default_factory=dict)
    loss: float | None = None  # mean over clients by weight, of those that tell
    spent: dict[int, Spent] = field(default_factory=dict)  # client -> what its ledger says


def gather(
    jobs: Mapping[int, Job],
    answers: Answers,
    weigh: Callable[[Update], float],
    sums: bool,
    keep: bool,
    instead: Callable[[Job, LoRA], None] | None = None,
) -> Gathered:
    """Take in the answers to these jobs; with `sums` and not `keep`, no update outlives its turn.

    `instead` takes each update, and then none is summed or kept here.
    """
    got, total = Gathered(), Sum()
    losses: list[float] = []
    weights: list[float] = []
    arrived: set[int] = set()
    for i, answer in answers:
        arrived.add(i)
        if isinstance(answer, Failure):
            got.failed[i] = answer
            continue
        lora, weight = widen(jobs[i], answer.lora), weigh(answer)
        got.answered += 1
        if answer.loss is not None:
            losses.append(weight * answer.loss)
            weights.append(weight)
        got.spent |= {i: answer.spent} if answer.spent else {}
        if instead:
            instead(jobs[i], lora)
        elif sums:
            total.add(lora, weight)
        if not instead and (keep or not sums):
            got.each[i] = lora, weight
    _name_the_missing(got, set(jobs) - arrived)
    if weights:
        got.loss = fsum(losses) / fsum(weights)  # whoever came first
    if got.answered and not instead:
        got.each = {i: got.each[i] for i in jobs if i in got.each}
        got.updates = [total.mean()] if sums else [lora for lora, _ in got.each.values()]
        got.weights = [total.weight] if sums else [weight for _, weight in got.each.values()]
    return got


def _name_the_missing(got: Gathered, missing: Iterable[int]) -> None:
    got.failed |= dict.fromkeys(sorted(missing), Failure("no answer", FailureKind.LATE))
    for i, failure in got.failed.items():
        log.warning("client %d failed: %s", i, failure.reason)
