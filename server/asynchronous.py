"""Asynchronous rounds: clients are always at work, and a buffer of K updates, of whatever versions, makes a new model.

Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation (FedBuff, AISTATS 2022),
https://arxiv.org/abs/2106.06639

    client i is given version v_i, trains, and sends u_i;  at the K-th update, with v the version of now,
    u_i' = x_v + (1 + v - v_i)^-a (u_i - x_{v_i}),    x_{v+1} = strategy.aggregate(u_1', ..., u_K')

An update is rebased on the start that its client would be given now, so that no strategy is changed: the mean of the
u_i' is FedBuff's step, and where all are of the version of now it is an ordinary round. An update that is more than
`server.max_staleness` versions old is refused. A client has one turn in a version: once it has answered, with success
or without, it waits for the next one, so that it has at most one update in a buffer, and its draws, which are seeded by
its version as by a round, are never the same twice.

Quick clients arrive more often, and the model leans towards them. With `fair` a change is divided by how often its
client arrives, relative to all: by (n_i + 1) / (n + 1), where n_i of its updates were used so far, and n would be if
all arrived alike. In the first version all count alike.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any, Protocol

from torch import Tensor

from fedlora.errors import Failure, FailureKind, PrivacyError, RoundFailed
from fedlora.jobs import Client, Job, PrivacySpent, Update, shared_start
from fedlora.lora import LoRA, at_least_float32, map_factors
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.run.plan import JobInFlight, JobsInFlight, Plan, ResumePoint, RoundResult
from fedlora.server import charges
from fedlora.server.adapter_checks import validate_adapter
from fedlora.server.aggregation import Answers, Collected, collect
from fedlora.server.cohort import Cohort, sample
from fedlora.server.refusals import failure_of
from fedlora.server.rounds import Fleet, Outcome, RoundStart, RunLoop, stalled, update_rules
from fedlora.server.step_limits import check_norm, update_norm
from fedlora.strategy import Strategy, next_state

LARGEST_CORRECTION = 10.0  # times that the change of a client that arrives seldom counts at most, where the run is fair
log = logging.getLogger("fedlora")
Refill = Callable[[int], Mapping[int, Job]]


class ArrivalFleet(Fleet, Protocol):
    """A fleet whose clients may each be at a job of its own, begun at its own time."""

    now: float  # seconds on the clock of the run

    def begin(self, jobs: Mapping[int, Job], began: Mapping[int, float]) -> None:
        """Send clients that have no job each its own; `began` says when, of one that an earlier process sent."""

    def arrivals(self, count: int, refill: Refill) -> Answers:
        """Yield the next `count` answers in the order in which they come, fewer where nobody is at work any more.

        After each but the last, `refill` is called with the client that has answered, and what it returns is begun.
        """


@dataclass(frozen=True, eq=False)
class _SentJob:
    """A job that a client is at."""

    client: Client
    job: Job  # whole, as the strategy made it
    version: int  # of the model that it starts from
    began: float  # on the clock of the run


@dataclass(eq=False)
class _Version:
    """The time in which one version of the model is the newest."""

    past: ResumePoint
    clients: Mapping[int, Client]  # that may be asked
    left: dict[int, _SentJob] = field(default_factory=dict)  # client -> the job that it has had its turn with
    refused: set[int] = field(default_factory=set)  # clients for which there is no job
    sent: list[Client] = field(default_factory=list)  # in the order in which they were sent jobs
    jobs: dict[int, Job] = field(default_factory=dict)  # of each client that has arrived, from this version's start
    arrivals: list[tuple[int, int]] = field(default_factory=list)  # client, how many versions old, in order
    told: dict[int, PrivacySpent] = field(default_factory=dict)  # client -> what its ledger says


def fit_asynchronously(
    strategy: Strategy[Any],
    fleet: ArrivalFleet,
    lora: LoRA,
    plan: Plan,
    past: ResumePoint | None = None,
) -> Iterator[RoundResult]:
    """Make the versions of the model that are left, `plan.rounds` in all, yielding after each.

    Raises `RoundFailed` where nobody has an update for a version, unless such versions are skipped.
    """
    past = past or ResumePoint(0, strategy.init(lora))
    loop = AsyncLoop(RunLoop(strategy, fleet, lora, plan, Cohort(plan)), fleet)
    loop.go_on(past)
    while past.rounds < plan.rounds and not stalled(past.losses, plan.policy.patience):
        done, past = loop.play(past)
        yield done


class AsyncLoop:
    """The clients that are at work, over all versions of a run."""

    def __init__(self, run: RunLoop, fleet: ArrivalFleet) -> None:
        self._run, self._fleet = run, fleet
        self._at_work: dict[int, _SentJob] = {}
        self._states: dict[int, Any] = {}  # of versions that clients are at work on
        self._used = Counter[int]()  # client -> updates that were used

    def go_on(self, past: ResumePoint) -> None:
        """Send the clients that were at work the same jobs again."""
        self._fleet.now = past.clock
        if not past.in_flight:
            return
        self._states, self._used = dict(past.in_flight.states), Counter(past.in_flight.used)
        clients = {c.id: c for c in self._fleet.clients()}
        for sent in past.in_flight.jobs:
            if sent.client in clients:
                client = clients[sent.client]
                job = self._run.job(self._states[sent.version], client, sent.version)
                self._at_work[client.id] = _SentJob(client, job, sent.version, sent.began)
        began = {i: sent.began for i, sent in self._at_work.items()}
        self._fleet.begin({i: select_rows(sent.job) for i, sent in self._at_work.items()}, began)

    def play(self, past: ResumePoint) -> tuple[RoundResult, ResumePoint]:
        """Collect the updates of one version, and make the next; return its result, and what it leaves."""
        run, start = self._run, RoundStart.now(self._fleet)
        version = _Version(past, {c.id: c for c in run.cohort.eligible(self._fleet.clients())})
        self._states[past.rounds] = past.state
        self._fill(version)
        got = collect(version.jobs, self._updates(version), update_rules(run.plan.policy), sums=True, keep=False)
        got.spent |= version.told
        dp, told = run.plan.record_level, [version.left[i].client for i in version.told]
        spent = charges.after_round(dp, past, version.sent, got)
        known = replace(past, spent={**past.spent, **charges.after_round(dp, past, told, got)})
        outcome = self._aggregate(past, got)
        self._used.update(i for i in version.jobs if i not in got.failed)
        asked, charged = tuple(version.jobs), spent.keys()
        done, after = run.finish(known.with_spent(spent), start, got, outcome, asked=asked, charged=charged)
        in_flight = self._in_flight()
        return (
            replace(done, clock=self._fleet.now, arrivals=tuple(version.arrivals), in_flight=in_flight),
            replace(after, clock=self._fleet.now, in_flight=in_flight),
        )

    def _aggregate(self, past: ResumePoint, got: Collected) -> Outcome:
        """Make the next state of the mean of the rebased updates; without any it stays, or the run ends."""
        run, t = self._run, past.rounds
        if got.answered:
            state = next_state(run.strategy, past.state, got.updates, got.weights, [])
            validate_adapter(run.strategy, state, run.lora, t)
            return Outcome(state)
        if run.plan.policy.below_quorum == "stop":
            why = "; ".join(f"client {i}: {failure.reason}" for i, failure in list(got.failed.items())[:3])
            raise RoundFailed(f"version {t + 1}: no client has an update for it ({why or _nobody(run.plan)})")
        log.warning("version %d is the one before: no client has an update for it", t + 1)
        return Outcome(past.state, skipped=True)

    def _in_flight(self) -> JobsInFlight:
        """What clients are at, as it is kept; states that nobody is at work on any more are forgotten."""
        needed = {sent.version for sent in self._at_work.values()}
        self._states = {v: state for v, state in self._states.items() if v in needed}
        jobs = tuple(JobInFlight(i, sent.version, sent.began) for i, sent in sorted(self._at_work.items()))
        return JobsInFlight(jobs, dict(self._states), dict(self._used))

    def _updates(self, version: _Version) -> Answers:
        """Yield answers until a buffer of updates is full or nobody is at work, each update rebased on this version."""
        buffer, taken = self._run.plan.buffer, 0
        while taken < buffer and self._at_work:
            for i, answer in self._fleet.arrivals(buffer - taken, partial(self._refill, version)):
                self._leave(version, i)
                answer = self._judged(version, i, answer)
                taken += isinstance(answer, Update)
                yield i, answer
            if taken < buffer:
                self._fill(version)

    def _judged(self, version: _Version, i: int, answer: Update | Failure) -> Update | Failure:
        """The update of client i, rebased on this version, or why it is none; it is noted that it has come."""
        t, sent = version.past.rounds, version.left[i]
        age = t - sent.version
        job = self._run.job(version.past.state, sent.client, t)
        version.jobs[i] = replace(job, sketch={})
        version.arrivals.append((i, age))
        if isinstance(answer, Failure):
            return answer
        if answer.spent:
            version.told[i] = answer.spent
        most = self._run.plan.policy.max_staleness
        if age > most:
            reason = f"its update is {age} versions old; server.max_staleness = {most}"
            return Failure(reason, FailureKind.REFUSED)
        return failure_of(self._as_of_now, version, sent, answer)

    def _as_of_now(self, version: _Version, sent: _SentJob, update: Update) -> Update:
        """The update, rebased on this version. Raises `WireError` for a change that goes too far then."""
        i, age = sent.client.id, version.past.rounds - sent.version
        job, share = version.jobs[i], self._share(version, i, age)
        lora = scatter_rows(sent.job, update.lora)
        if age or share != 1:
            lora = rebased(lora, shared_start(sent.job), shared_start(job), share)
        check_norm(update_norm(lora, job), self._run.plan.policy.largest_step)
        return replace(update, lora=lora)

    def _share(self, version: _Version, i: int, age: int) -> float:
        """The factor on the change of client i: by how old its update is and, in a fair run, how often it arrives."""
        plan = self._run.plan
        fresh: float = (1.0 + age) ** -plan.policy.staleness
        if not plan.policy.fair:
            return fresh
        expected = plan.buffer / len(version.clients) * version.past.rounds  # updates, if all came as often
        return fresh * min(LARGEST_CORRECTION, (expected + 1) / (self._used[i] + 1))

    def _refill(self, version: _Version, i: int) -> dict[int, Job]:
        """The jobs of clients that begin because client i has answered."""
        self._leave(version, i)
        return self._next_jobs(version)

    def _leave(self, version: _Version, i: int) -> None:
        """Note that client i has had its turn."""
        if i in self._at_work:
            version.left[i] = self._at_work.pop(i)

    def _fill(self, version: _Version) -> None:
        """Have as many clients at work as the run has at once."""
        jobs = self._next_jobs(version)
        self._fleet.begin(jobs, {})

    def _next_jobs(self, version: _Version) -> dict[int, Job]:
        """New jobs, as they are sent, for clients that are at none, drawn by the seed; none where all are busy."""
        plan, t = self._run.plan, version.past.rounds
        room = plan.cohort - len(self._at_work)
        purpose = f"asynchronous {len(version.sent)}"
        jobs: dict[int, Job] = {}
        for client in sample(self._idle(version), room, plan.seed, t, purpose):
            try:
                job = self._run.job(version.past.state, client, t, version.past.spent.get(client.id))
            except PrivacyError as e:  # no noise that its counts need can be computed
                self._run.cohort.leave_out(client, str(e))
                version.refused.add(client.id)
                continue
            self._at_work[client.id] = _SentJob(client, job, t, self._fleet.now)
            version.sent.append(client)
            jobs[client.id] = select_rows(job)
        return jobs

    def _idle(self, version: _Version) -> list[Client]:
        """The clients that may be sent a job of this version."""
        dp = self._run.plan.record_level
        most = dp.max_participations if dp else inf
        busy = self._at_work.keys() | version.left.keys() | version.refused
        joined = version.past.joined
        return [c for i, c in version.clients.items() if i not in busy and joined.get(i, 0) < most]


def _nobody(plan: Plan) -> str:
    """Why no client could be sent a job."""
    dp = plan.record_level
    if not dp:
        return "none could be asked"
    return f"every client has joined dp.joins = {dp.max_participations} versions, and has no budget for more"


def rebased(update: LoRA, start: LoRA, now: LoRA, share: float) -> LoRA:
    """The update's change from its start, times `share`, over another start."""

    def moved(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (y.double() + share * (u.double() - x.double())).to(at_least_float32(u).dtype)

    return map_factors(moved, update, start, now)
