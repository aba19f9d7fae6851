"""The server's side of secure aggregation: one round in four steps, in which the sum of the updates is all it can read.

    advertise keys   `join`: who takes part, and with which keys
    share keys       `share`: who holds which shares of whose secrets
    masked input     `train`: every client's masked update, added to the others' as it comes
    unmasking        `reveal`: the shares that take the masks off the sum

The mean of the clients that stayed to the end is this sum over the sum of their weights. The protocol itself is in
`fedlora.privacy.secure_aggregation`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from secrets import token_hex
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.errors import Failure, FailureKind, SecureError
from fedlora.jobs import Job, MaskingTerms, SecAggStep
from fedlora.lora import from_matrices, map_factors, normalised
from fedlora.privacy.client_level import ClippedSum
from fedlora.privacy.masked_update import MOST_LOSS, decode, layout, masking_terms, roster_of, size
from fedlora.privacy.secure_aggregation import FEWEST, Ring, Roster, unmask
from fedlora.sections import SecureConfig
from fedlora.server.aggregation import Answers, Collected, capped

T = TypeVar("T")
log = logging.getLogger("fedlora")


class Askable(Protocol):
    """The two methods of a fleet that secure aggregation needs."""

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step, and return the clients' answers."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Have each client do its job, and yield the updates as they come."""


@dataclass
class SecAggRound:
    """A round's roster, and the sum of the masked vectors that have come from some of its members."""

    roster: Roster
    weights: Mapping[int, float]  # of every member, summing to 1
    reach: float  # the largest change of a number
    total: Ring
    arrived: set[int] = field(default_factory=set)  # members whose vectors are in the sum

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
    config: SecureConfig,
    *,
    uniform: bool,
    max_share: float = 1.0,
    clipped_sum: ClippedSum | None = None,
) -> Collected:
    """Run a round's jobs, and return one update for all clients: the weighted mean.

    `uniform` gives every client the same weight; else no client of three or more has more than `max_share`. If
    `clipped_sum` is given (client-level DP), clients clip their updates and the sum is put there; all weigh the same
    then. Where too few clients stay for a sum, none counts as having answered, and `failed` says why.
    """
    got = Collected()
    if not jobs:
        return got
    clip = clipped_sum.clip if clipped_sum else 0.0
    sent: dict[int, Job] = {}
    try:
        uniform = uniform or clipped_sum is not None
        secagg = _advertise_keys(fleet, jobs, config, got, uniform=uniform, max_share=max_share, clip=clip)
        sent = _mask_jobs(fleet, jobs, secagg, got, clip=clip)
        _sum_masked(fleet, sent, secagg, got)
        plain = _unmask(fleet, secagg)
    except (SecureError, ValueError, KeyError) as e:
        stopped = Failure(f"secure aggregation: {e}", FailureKind.SECURE)
        got.failed = {i: got.failed.get(i, replace(stopped, sent=i in sent)) for i in jobs}
        log.warning("secure aggregation: %s", e)
        return got
    got.answered = len(secagg.arrived)
    total = decode(plain, reach=secagg.reach, members=len(secagg.weights))
    _read(got, next(iter(sent.values())), total, secagg, clipped_sum)
    return got


def _advertise_keys(
    fleet: Askable,
    jobs: Mapping[int, Job],
    config: SecureConfig,
    got: Collected,
    *,
    uniform: bool,
    max_share: float,
    clip: float,
) -> SecAggRound:
    """Ask all clients for their public keys; the roster is made of those that answer.

    No update that is clipped is beyond reach: whether a client drops out would depend on its data.
    """
    t = next(iter(jobs.values())).round
    context = f"round {t + 1} ({token_hex(8)})"
    joined = _answers(got, fleet.ask(dict.fromkeys(jobs, SecAggStep("join", context, round=t))))
    threshold = max(FEWEST, len(joined) // 2 + 1, ceil(config.threshold * len(joined)))
    advertised = {i: (said["sealing"], said["masking"], said["mark"]) for i, said in joined.items()}
    roster = roster_of(SecAggStep("share", context, roster=advertised, threshold=threshold))
    counts = [1.0 if uniform else _count(jobs[i], said) for i, said in joined.items()]
    weights = dict(zip(joined, normalised(capped(counts, max_share)), strict=True))
    return SecAggRound(roster, weights, reach=max(config.reach, clip), total=np.zeros(0, "<u4"))


def _count(job: Job, said: Mapping[str, str]) -> float:
    """Return how many records, or else examples, a client that joined says it has."""
    return float(said["records"] if job.privacy else said["examples"])


def _mask_jobs(
    fleet: Askable, jobs: Mapping[int, Job], secagg: SecAggRound, got: Collected, *, clip: float
) -> dict[int, Job]:
    """Have the members share their secrets; return the jobs of those that did, with what masking needs."""
    roster = secagg.roster
    advertised = {i: (k.sealing.hex(), k.masking.hex(), k.commitment.hex()) for i, k in roster.keys.items()}
    ask = SecAggStep("share", roster.context, roster=advertised, threshold=roster.threshold)
    sealed = _answers(got, fleet.ask(dict.fromkeys(advertised, ask)))
    roster.enough(len(sealed), "shared their secrets")

    def masked(i: int) -> Job:
        terms = MaskingTerms(
            context=roster.context,
            weight=secagg.weights[i],
            reach=secagg.reach,
            members=len(roster.keys),
            inbox={sender: said[str(i)] for sender, said in sealed.items() if sender != i},
            clip=clip,
        )
        return replace(jobs[i], masking=terms)

    return {i: masked(i) for i in sealed}


def _sum_masked(fleet: Askable, jobs: Mapping[int, Job], secagg: SecAggRound, got: Collected) -> None:
    """Let every client train, and sum the masked vectors as they come."""
    secagg.total = np.zeros(size(next(iter(jobs.values()))), "<u4")
    for i, answer in fleet.train(jobs):
        if isinstance(answer, Failure):
            _note(got, i, answer)
        elif answer.masked is None:
            _note(got, i, Failure("its update is not masked", FailureKind.REFUSED))
        else:
            secagg.add(i, answer.masked)
            got.spent |= {i: answer.spent} if answer.spent else {}


def _unmask(fleet: Askable, secagg: SecAggRound) -> Ring:
    """Ask the clients that stayed for their shares, and return the sum without its masks."""
    roster, survivors = secagg.roster, tuple(sorted(secagg.arrived))
    roster.enough(len(survivors), "sent a masked update")
    ask = SecAggStep("reveal", roster.context, survivors=survivors)
    late = Collected()  # a client whose update is in the sum has answered, whatever became of it since
    revealed = _answers(late, fleet.ask(dict.fromkeys(survivors, ask)))
    return unmask(roster, secagg.total, survivors, {i: _read_shares(said) for i, said in revealed.items()})


def _read_shares(said: Mapping[str, str]) -> dict[int, bytes]:
    return {int(owner): bytes.fromhex(share) for owner, share in said.items()}


def _answers(got: Collected, replies: Mapping[int, T | Failure]) -> dict[int, T]:
    """Return the replies that are no failures; the failures are noted in `got`."""
    answers: dict[int, T] = {}
    for i, reply in replies.items():
        if isinstance(reply, Failure):
            _note(got, i, replace(reply, sent=False))  # no job yet, so that nothing was charged
        else:
            answers[i] = reply
    return answers


def _note(got: Collected, i: int, failure: Failure) -> None:
    got.failed[i] = failure
    log.warning("client %d failed: %s", i, failure.reason)


def _read(
    got: Collected, job: Job, total: NDArray[np.float64], secagg: SecAggRound, clipped_sum: ClippedSum | None
) -> None:
    """Put the sum into `got` as the mean of the clients that stayed, and into `clipped_sum` if that is given."""
    changes, extras = _split(job, total)
    if clipped_sum:
        n = len(secagg.weights)  # each weighs 1/n in the sum
        clipped_sum.total.update({key: change * n for key, change in changes.items()})
        clipped_sum.below = extras[-1] * n
    if job.metrics:
        got.loss = extras[0] * MOST_LOSS / secagg.arrived_weight
    mean = from_matrices((s, m, change / secagg.arrived_weight) for (s, m), change in changes.items())
    got.updates, got.weights = [map_factors(_moved, job.start.only(job.shares), mean)], [1.0]


def _moved(start: Tensor, change: Tensor) -> Tensor:
    return (start.double() + change).to(torch.promote_types(start.dtype, torch.float32))


def _split(job: Job, total: NDArray[np.float64]) -> tuple[dict[tuple[str, str], Tensor], list[float]]:
    """Return the changes in the sum by (side, module), and the numbers behind them: loss and count, where told."""
    changes: dict[tuple[str, str], Tensor] = {}
    at = 0
    for s, m, shape in layout(job):
        changes[s, m] = torch.from_numpy(total[at : at + shape.numel()].reshape(shape))
        at += shape.numel()
    return changes, [float(x) / masking_terms(job).reach for x in total[at:]]
