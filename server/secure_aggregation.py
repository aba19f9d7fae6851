"""The server's side of secure aggregation: one round in four steps, in which the sum of the updates is all it can read.

    advertise keys   `join`: who takes part, and with which keys
    share keys       `share`: who holds which shares of whose secrets
    masked input     `train`: every client's masked update, added to the others' as it comes
    unmasking        `reveal`: the shares that take the masks off the sum

A round with two exchanges goes through these steps twice, each time with new keys: the second time among those that are
in the first sum, with the weights that they have there. Where a few of them are missing at its end, the sum stays
masked: the clients reveal nothing then, as the two sums together would tell what the missing ones trained.

The mean of the clients that stayed to the end is this sum over the sum of their weights. The protocol itself is in
`fedlora.privacy.secure_aggregation`, and what a member may say in `fedlora.server.secagg_replies`: one that says
something else is left out, and the others go on without it.

No single update is seen, so none is held against `server.largest_step` or the others of its round. What is checked is
the sum: no number of it may exceed `secure.reach`, nor the norm of the mean the largest step of one client. A member
that sends what is no update can move each number of the mean by as much as `secure.reach` and not be named.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, inf
from secrets import token_hex
from types import MappingProxyType
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.errors import Failure, FailureKind, SecureError, SumLost
from fedlora.jobs import Client, Job, MaskingTerms, SecAggStep, shared_start
from fedlora.lora import from_matrices, map_factors, normalised
from fedlora.privacy.client_level import ClippedSum
from fedlora.privacy.masked_update import MOST_LOSS, MOST_WEIGHT, decode, flags_loss, layout, masking_terms, size
from fedlora.privacy.secure_aggregation import Ring, Roster, least_threshold, unmask, why_exposed
from fedlora.sections import SecureConfig
from fedlora.server.aggregation import Answers, Collected, capped
from fedlora.server.refusals import failure_of
from fedlora.server.secagg_replies import Joined, read_joined, read_sealed, read_shares, repeated_keys

Said = Mapping[str, str]
X = TypeVar("X")
ROUNDING = 1e-6  # relative: of weights that do not quite sum to 1; numbers themselves are rounded towards zero
log = logging.getLogger("fedlora")


class Askable(Protocol):
    """The two methods of a fleet that secure aggregation needs."""

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step, and return the clients' answers."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Have each client do its job, and yield the updates as they come."""


@dataclass(frozen=True, kw_only=True)
class MaskingRules:
    """How a round's updates are weighed and masked, and what their sum may be."""

    secure: SecureConfig
    uniform: bool = False  # all weigh the same, and not by their examples
    largest_step: float = inf  # norm of the mean above which there is no sum
    clip: float = 0.0  # of a client's whole update, in a run that hides clients; 0: not clipped

    @property
    def reach(self) -> float:
        """The largest change of a number. An update that is clipped never exceeds it: who drops out may not depend on
        data there."""
        return max(self.secure.reach, self.clip)

    def threshold(self, members: int) -> int:
        """Return how many of these members must stay to the end."""
        return max(least_threshold(members, colluders=self.secure.colluders), ceil(self.secure.threshold * members))


@dataclass
class SecAggRound:
    """A round's roster, and the sum of the masked vectors that have come from some of its members."""

    roster: Roster
    weights: Mapping[int, float]  # of every member, summing to 1
    owners: tuple[int, ...] = ()  # members that shared their secrets, and so mask with one another
    total: Ring = field(default_factory=lambda: np.zeros(0, "<u4"))
    arrived: set[int] = field(default_factory=set)  # members whose vectors are in the sum
    before: Mapping[int, float] = field(default_factory=dict)  # weights of the round's first sum, in a second

    @property
    def arrived_weight(self) -> float:
        """The weight of the members whose vectors are in the sum."""
        return sum(self.weights[i] for i in self.arrived)

    def add(self, i: int, masked: Tensor) -> None:
        """Add member i's masked vector, whose numbers are to be read as unsigned."""
        self.total += masked.numpy().view(np.uint32)
        self.arrived.add(i)


def collect_masked(
    fleet: Askable,
    jobs: Mapping[int, Job],
    clients: Mapping[int, Client],
    rules: MaskingRules,
    clipped_sum: ClippedSum | None = None,
    before: Mapping[int, float] = MappingProxyType({}),
) -> Collected:
    """Run a round's jobs, and return one update for all clients: the weighted mean.

    `clients` are those that the run knows, by their ids: none weighs more than by what it said then. If `clipped_sum`
    is given (client-level DP), the sum of the clipped updates is put there. `before` has the weights of those that are
    in the round's first sum, where this is its second. Where too few clients stay for a sum, none
    counts as having answered, and `failed` says why.
    """
    got = Collected()
    if not jobs:
        return got
    sent: dict[int, Job] = {}
    try:
        secagg = _advertise_keys(fleet, jobs, clients, rules, got, before)
        sent = _mask_jobs(fleet, jobs, secagg, got, rules)
        _sum_masked(fleet, sent, secagg, got)
        total = _unmask(fleet, secagg, rules)
        _read(got, next(iter(sent.values())), total, secagg, rules, clipped_sum)
    except SecureError as e:
        _note_stopped(got, jobs, sent, e)
        return got
    got.answered = len(secagg.arrived)
    got.in_sum = {i: secagg.weights[i] for i in sorted(secagg.arrived)}
    return got


def _note_stopped(got: Collected, jobs: Mapping[int, Job], sent: Mapping[int, Job], error: SecureError) -> None:
    """Note that there is no sum: all have failed for this reason, and a member whose doing it is was refused.

    `sent` has the jobs that went out, which their clients were charged for.
    """
    reason = f"secure aggregation: {error}"
    got.failed = {i: got.failed.get(i, Failure(reason, error.code.kind, sent=i in sent)) for i in jobs}
    if isinstance(error, SumLost) and error.member is not None:
        got.failed[error.member] = Failure(reason, FailureKind.REFUSED)
    log.warning("secure aggregation: %s", error)


def _advertise_keys(
    fleet: Askable,
    jobs: Mapping[int, Job],
    clients: Mapping[int, Client],
    rules: MaskingRules,
    got: Collected,
    before: Mapping[int, float],
) -> SecAggRound:
    """Ask all clients for their public keys; the roster is made of those that answer."""
    t, exchange = next(iter(jobs.values())).round, int(bool(before))
    context = f"round {t + 1}{' second pass' * exchange} ({token_hex(8)})"

    ask = SecAggStep("join", context, round=t, exchange=exchange)

    def read(i: int, said: Said) -> Joined:
        return read_joined(said, jobs[i], clients[i])

    joined = _answers(got, fleet.ask(dict.fromkeys(jobs, ask)), read)
    for i in sorted(repeated_keys(joined)):
        _note(got, i, Failure("one of its keys occurs twice", FailureKind.REFUSED))
        del joined[i]
    keys = {i: member.keys for i, member in joined.items()}
    weights = {i: before[i] for i in joined} if before else _weights(joined, rules)
    roster = Roster(context, keys, rules.threshold(len(keys)), rules.secure.colluders)
    return SecAggRound(roster, weights, before=before)


def _weights(joined: Mapping[int, Joined], rules: MaskingRules) -> dict[int, float]:
    """The weight of each member, summing to 1: by its count, or all alike."""
    counts = [1.0 if rules.uniform or rules.clip else float(member.count) for member in joined.values()]
    return dict(zip(joined, normalised(capped(counts, MOST_WEIGHT)), strict=True)) if joined else {}


def _mask_jobs(
    fleet: Askable, jobs: Mapping[int, Job], secagg: SecAggRound, got: Collected, rules: MaskingRules
) -> dict[int, Job]:
    """Have the members share their secrets; return the jobs of those that did, with what masking needs."""
    roster = secagg.roster
    advertised = {i: (k.sealing.hex(), k.masking.hex(), k.commitment.hex()) for i, k in roster.keys.items()}
    ask = SecAggStep("share", roster.context, roster=advertised, threshold=roster.threshold)

    def read(i: int, said: Said) -> Mapping[int, str]:
        return read_sealed(said, roster.keys.keys() - {i})

    sealed = _answers(got, fleet.ask(dict.fromkeys(advertised, ask)), read)
    roster.enough(len(sealed), "shared their secrets")
    secagg.owners = tuple(sorted(sealed))

    def masked(i: int) -> Job:
        terms = MaskingTerms(
            context=roster.context,
            weight=secagg.weights[i],
            reach=rules.reach,
            members=len(roster.keys),
            inbox={sender: messages[i] for sender, messages in sealed.items() if sender != i},
            clip=rules.clip,
        )
        return replace(jobs[i], masking=terms)

    return {i: masked(i) for i in sealed}


def _sum_masked(fleet: Askable, jobs: Mapping[int, Job], secagg: SecAggRound, got: Collected) -> None:
    """Let every client train, and sum the masked vectors as they come."""
    secagg.total = np.zeros(size(next(iter(jobs.values()))), "<u4")
    for i, answer in fleet.train(jobs):
        if isinstance(answer, Failure):
            _note(got, i, answer)
            continue
        got.spent |= {i: answer.spent} if answer.spent else {}
        if answer.masked is None:
            _note(got, i, Failure("its update is not masked", FailureKind.REFUSED))
        else:
            secagg.add(i, answer.masked)


def _unmask(fleet: Askable, secagg: SecAggRound, rules: MaskingRules) -> NDArray[np.float64]:
    """Ask the clients that stayed for their shares, and return the sum without its masks, decoded."""
    roster, survivors = secagg.roster, tuple(sorted(secagg.arrived))
    roster.enough(len(survivors), "sent a masked update")
    if secagg.before and (why := why_exposed(secagg.before, survivors, colluders=rules.secure.colluders)):
        raise SumLost(f"{roster.context}: the members' shares stay with them: {why}; the round is skipped")
    ask = SecAggStep("reveal", roster.context, survivors=survivors)
    late = Collected()  # a client whose update is in the sum has answered, whatever became of it since

    def read(i: int, said: Said) -> Mapping[int, bytes]:
        return read_shares(said, secagg.owners)

    revealed = _answers(late, fleet.ask(dict.fromkeys(survivors, ask)), read)
    try:
        plain = unmask(roster, secagg.total, survivors, revealed, owners=secagg.owners)
    except SecureError as e:  # all have answered, and what is missing are shares: no client's dropping out
        raise e if isinstance(e, SumLost) else SumLost(str(e)) from e
    return decode(plain, reach=rules.reach, members=len(roster.keys))


def _answers(got: Collected, replies: Mapping[int, Said | Failure], read: Callable[[int, Said], X]) -> dict[int, X]:
    """Return what `read` makes of the replies; those that are failures, or not what they must be, are noted."""
    answers: dict[int, X] = {}
    for i, reply in replies.items():
        answer = reply if isinstance(reply, Failure) else failure_of(read, i, reply)
        if isinstance(answer, Failure):
            # It has no job yet, and so was charged for nothing, unless it has masked an update of this round before.
            _note(got, i, replace(answer, sent=answer.kind == FailureKind.MASKED))
        else:
            answers[i] = answer
    return answers


def _note(got: Collected, i: int, failure: Failure) -> None:
    got.failed[i] = failure
    log.warning("client %d failed: %s", i, failure.reason)


def _read(
    got: Collected,
    job: Job,
    total: NDArray[np.float64],
    secagg: SecAggRound,
    rules: MaskingRules,
    clipped_sum: ClippedSum | None,
) -> None:
    """Put the sum into `got` as the mean of the clients that stayed, and into `clipped_sum` if that is given."""
    weight = secagg.arrived_weight
    changes, extras = _split(job, total)
    _check_sum(total[: len(total) - len(extras)], weight, rules, secagg.roster.context)
    if clipped_sum:
        n = len(secagg.weights)  # each weighs 1/n in the sum
        clipped_sum.total.update({key: change * n for key, change in changes.items()})
        clipped_sum.below = extras[-1] * n
    if job.metrics:
        got.loss = _mean_loss(extras, extras[1] if flags_loss(job) else weight)
    mean = from_matrices((s, m, change / weight) for (s, m), change in changes.items())
    got.updates, got.weights = [map_factors(_moved, shared_start(job), mean)], [1.0]


def _check_sum(changes: NDArray[np.float64], weight: float, rules: MaskingRules, context: str) -> None:
    """Raise `SumLost` for a sum that updates of clients with this weight in all, each within reach, do not have."""
    largest = float(np.abs(changes).max(initial=0.0))
    if largest > rules.reach * weight * (1 + ROUNDING):
        raise SumLost(
            f"{context}: the sum has a number of {largest:g}, and updates within secure.reach = {rules.reach:g} add up "
            f"to {rules.reach * weight:g} at most: a member sent what is no update; the round is skipped"
        )
    norm = float(np.linalg.norm(changes)) / weight
    if norm > rules.largest_step:
        raise SumLost(
            f"{context}: the mean of the updates has norm {norm:.4g}; server.largest_step = {rules.largest_step:g}: a "
            "member sent what is no update; the round is skipped"
        )


def _moved(start: Tensor, change: Tensor) -> Tensor:
    return (start.double() + change).to(torch.promote_types(start.dtype, torch.float32))


def _mean_loss(extras: list[float], weight: float) -> float | None:
    """The mean loss of clients that weigh so much; None where none told one, and the weight is what rounding left."""
    return extras[0] * MOST_LOSS / weight if weight > ROUNDING else None


def _split(job: Job, total: NDArray[np.float64]) -> tuple[dict[tuple[str, str], Tensor], list[float]]:
    """Return the changes in the sum by (side, module), and the numbers behind them, as `vector` has them."""
    changes: dict[tuple[str, str], Tensor] = {}
    at = 0
    for s, m, shape in layout(job):
        changes[s, m] = torch.from_numpy(total[at : at + shape.numel()].reshape(shape))
        at += shape.numel()
    return changes, [float(x) / masking_terms(job).reach for x in total[at:]]
