"""A round by secure aggregation, the server's part: four messages, and the sum of the updates is all it can read.

    join, share   who takes part, and who holds which shares of whose secrets
    train         every client's masked update, added to the others' as it comes
    reveal        the shares that take the masks off that sum

The mean of those who stayed to the end is the sum over the sum of their weights. The protocol itself is `secure`.
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

from fedlora.errors import Failure, FailureKind, SecureError
from fedlora.jobs import Job, MaskingTerms, SecAggStep
from fedlora.lora import LoRA, normalised
from fedlora.privacy.client_level import ClippedSum
from fedlora.privacy.masked_update import MOST_LOSS, decode, layout, masking_terms, roster_of, size
from fedlora.privacy.secure_aggregation import FEWEST, Ring, Roster, unmask
from fedlora.sections import SecureConfig as SecureConfig
from fedlora.server.aggregation import Answers, Collected

T = TypeVar("T")
log = logging.getLogger("fedlora")


class Askable(Protocol):
    """What of a fleet this needs."""

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]: ...
    def train(self, jobs: Mapping[int, Job]) -> Answers: ...


@dataclass
class SecAggRound:
    """A round's members, and the sum of the masked vectors that came, with the weights of those they came from."""

    members: Roster
    weights: Mapping[int, float]  # of every member, summing to 1
    ring: Ring
    there: set[int] = field(default_factory=set)

    @property
    def share(self) -> float:
        """Of the weight, what stayed."""
        return sum(self.weights[i] for i in self.there)


def collect_masked(
    fleet: Askable, jobs: Mapping[int, Job], config: SecureConfig, uniform: bool, instead: ClippedSum | None = None
) -> Collected:
    """Let these jobs be done; their one update is the weighted mean. With `instead` the clipped sum goes there.

    Where too few clients stay for a sum, nobody counts as having answered, and `failed` says why.
    """
    got = Collected()
    if not jobs:
        return got
    try:
        table = _seat(fleet, jobs, config, uniform or instead is not None, got)
        jobs = _train(fleet, jobs, table, config, instead.clip if instead else 0.0, got)
        plain = _unmask(fleet, table, got)
    except (SecureError, ValueError, KeyError) as e:
        stopped = Failure(f"secure aggregation: {e}", FailureKind.SECURE)
        got.failed = {i: got.failed.get(i, stopped) for i in jobs}
        log.warning("secure aggregation: %s", e)
        return got
    _read(got, next(iter(jobs.values())), decode(plain, config.reach, len(table.members.keys)), table, instead)
    return got


def _seat(fleet: Askable, jobs: Mapping[int, Job], config: SecureConfig, uniform: bool, got: Collected) -> SecAggRound:
    """Who joins, with which keys and weight, and how many of them must stay."""
    context = f"round {next(iter(jobs.values())).round + 1} ({token_hex(8)})"
    joined = _answers(got, fleet.ask({i: SecAggStep("join", context) for i in jobs}))
    threshold = max(FEWEST, len(joined) // 2 + 1, ceil(config.threshold * len(joined)))
    roster = {i: (said["sealing"], said["masking"], said["mark"]) for i, said in joined.items()}
    count = {i: said["records" if jobs[i].privacy else "examples"] for i, said in joined.items()}
    p = normalised([1.0 if uniform else float(count[i]) for i in joined])
    return SecAggRound(
        roster_of(SecAggStep("share", context, roster, threshold)),
        dict(zip(joined, p, strict=True)),
        np.zeros(0, "<u4"),
    )


def _train(
    fleet: Askable, jobs: Mapping[int, Job], table: SecAggRound, config: SecureConfig, clip: float, got: Collected
) -> dict[int, Job]:
    """Shares are dealt out, every client trains, and what comes is added up; the jobs as they were sent."""
    members = table.members
    roster = {i: (k.sealing.hex(), k.masking.hex(), k.mark.hex()) for i, k in members.keys.items()}
    sealed = _answers(
        got, fleet.ask({i: SecAggStep("share", members.context, roster, members.threshold) for i in roster})
    )
    members.enough(len(sealed), "shared their secrets")

    def hidden(i: int) -> Job:
        inbox = {other: said[str(i)] for other, said in sealed.items() if other != i}
        terms = members.context, table.weights[i], config.reach, len(members.keys), inbox, clip
        return replace(jobs[i], masking=MaskingTerms(*terms))

    sent = {i: hidden(i) for i in sealed}
    table.ring = np.zeros(size(next(iter(sent.values()))), "<u4")
    for i, answer in fleet.train(sent):
        if isinstance(answer, Failure) or answer.masked is None:
            bare = Failure("its update is not masked", FailureKind.REFUSED)
            got.failed[i] = answer if isinstance(answer, Failure) else bare
            log.warning("client %d failed: %s", i, got.failed[i].reason)
        else:
            table.ring += answer.masked.numpy().view(np.uint32)
            table.there.add(i)
            got.spent |= {i: answer.spent} if answer.spent else {}
    return sent


def _unmask(fleet: Askable, table: SecAggRound, got: Collected) -> Ring:
    """The shares of those who stayed, and the sum without its masks."""
    members, survivors = table.members, tuple(sorted(table.there))
    members.enough(len(survivors), "sent a masked update")
    late = Collected()  # whose update is in the sum has answered, whatever became of it since
    revealed = _answers(
        late, fleet.ask({i: SecAggStep("reveal", members.context, survivors=survivors) for i in survivors})
    )
    got.answered = len(survivors)
    whose = {i: {int(owner): bytes.fromhex(share) for owner, share in said.items()} for i, said in revealed.items()}
    return unmask(members, table.ring, survivors, whose)


def _answers(got: Collected, replies: Mapping[int, T | Failure]) -> dict[int, T]:
    """The replies that are one; the reasons of the others are taken down."""
    for i, reply in replies.items():
        if isinstance(reply, Failure):
            got.failed[i] = reply
            log.warning("client %d failed: %s", i, reply.reason)
    return {i: reply for i, reply in replies.items() if not isinstance(reply, Failure)}


def _read(got: Collected, job: Job, plain: NDArray[np.float64], table: SecAggRound, instead: ClippedSum | None) -> None:
    """The sum in its places: as the mean of those who stayed, or where the run hides clients as their clipped sum."""
    at, n = 0, len(table.members.keys)
    sides: dict[str, dict[str, torch.Tensor]] = {s: {} for s in job.shares}
    for s, m, shape in layout(job):
        part = torch.from_numpy(plain[at : at + shape.numel()].reshape(shape))
        at += shape.numel()
        if instead:
            instead.total[s, m] = part * n
        start = job.start.side(s)[m]
        moved = start.double() + part / table.share
        sides[s][m] = moved.to(torch.promote_types(start.dtype, torch.float32))
    if job.metrics:
        got.loss, at = float(plain[at] / masking_terms(job).reach) * MOST_LOSS / table.share, at + 1
    if instead:
        instead.below = float(plain[at] / masking_terms(job).reach) * n
    got.updates, got.weights = [LoRA(**sides)], [1.0]
