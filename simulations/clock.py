"""A clock of the simulation's own: clients differ in speed, are away at times and get lost, and the server waits by it.

A job takes its client as long as its examples do at the client's speed; what an answer holds does not depend on the
clock. Rounds end by the rules of a deployment (`server.quorum`, `server.deadline`, `server.grace`), judged on this
clock. In an asynchronous run clients arrive in the order of the clock, ties by their numbers. An update is that of the
job as it was sent, whenever it is computed: those that are next to arrive are computed together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from random import Random

from fedlora.errors import Failure, FailureKind
from fedlora.jobs import Client, Job, SecAggStep
from fedlora.metrics import Metrics
from fedlora.sections import Policy, Training
from fedlora.server.aggregation import Answers
from fedlora.server.fleet_rules import AnswerClock, AnswerTimes, rules_of
from fedlora.server.rounds import Fleet
from fedlora.simulations.client_traces import ClientTrace

LOST = Failure("lost: it went away with its job", FailureKind.OFFLINE)


def work(job: Job, client: Client) -> float:
    """How many examples a job goes through, each as often as it does."""
    training = job.training
    if not job.trains:
        return 0.0
    if job.privacy:
        return job.privacy.steps * job.privacy.rate * client.records
    if training.steps:
        return float(training.steps * min(_step(training), client.examples))
    return training.epochs * client.examples


def _silence(seconds: float) -> Failure:
    return Failure(f"no answer after {round(seconds, 1):g} s", FailureKind.LATE)


def _step(training: Training) -> int:
    return training.batch_size * training.accumulate


@dataclass(frozen=True, eq=False)
class _TimedJob:
    """A job that a client is at, with when its answer is due on the clock."""

    job: Job
    due: float  # when its answer comes, or the client is found to be lost, or is given up
    is_lost: bool
    is_late: bool = False  # it is given up, and whatever it answers later is not taken


class ClockedFleet:
    """The clients of another fleet, each as quick as its trace says."""

    def __init__(
        self, fleet: Fleet, traces: Sequence[ClientTrace], seed: int, policy: Policy, *, threshold: float = 0.0
    ) -> None:
        """`threshold` is the share that secure aggregation needs, if it is on."""
        self.traffic = fleet.traffic
        self.simulated_seconds = 0.0  # since the run began
        self._fleet, self._traces, self._seed, self._policy = fleet, traces, seed, policy
        self._rules = rules_of(policy, len(traces), threshold=threshold)
        self._at_work: dict[int, _TimedJob] = {}  # in an asynchronous run

    @property
    def now(self) -> float:
        """The time on the clock."""
        return self.simulated_seconds

    @now.setter
    def now(self, seconds: float) -> None:
        self.simulated_seconds = round(seconds, 3)  # as rounds.jsonl has it, from which a resumed run goes on

    def clients(self) -> Sequence[Client]:
        """All clients, with their counts and ranks."""
        return self._fleet.clients()

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation, which takes no time."""
        return self._fleet.ask(asks)

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Measure the model of every job on its client's held-out examples, which takes no time."""
        return self._fleet.evaluate(jobs)

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job; yield each answer that comes before the round ends, and why the others do not.

        What clients do for their own use after the last round nobody waits for, and takes no time.
        """
        if any(job.stage != "round" for job in jobs.values()):
            yield from self._fleet.train(jobs)
            return
        began, timed = self.now, self._timed(jobs, {})
        self.now = self._end_of_round([*timed.values()])
        silent = _silence(self.now - began)
        for i, answer in self._fleet.train({i: sent.job for i, sent in timed.items() if not sent.is_lost}):
            yield i, silent if timed[i].due > self.now else answer
        yield from ((i, LOST) for i, sent in timed.items() if sent.is_lost)

    def _end_of_round(self, timed: Sequence[_TimedJob]) -> float:
        """When the server waits for nobody any more, by the rules of a deployment; each answer counts as a good one."""
        began = self.now
        clock = AnswerClock(self._rules, AnswerTimes(), len(timed), now=lambda: self.now)
        for sent in sorted(timed, key=lambda sent: sent.due):
            if sent.due - began > clock.limit():
                return began + clock.limit()
            self.now = sent.due
            if not sent.is_lost:
                clock.answered()
        return self.now

    def begin(self, jobs: Mapping[int, Job], began: Mapping[int, float]) -> None:
        """Send clients that are at none a job each; `began` says when, of one that an earlier process sent."""
        for i, sent in self._timed(jobs, began).items():
            limit = began.get(i, self.now) + (self._policy.deadline or inf)
            is_late = sent.due > limit
            self._at_work[i] = replace(sent, due=limit, is_late=True) if is_late else sent

    def arrivals(self, count: int, refill: Callable[[int], Mapping[int, Job]]) -> Answers:
        """Yield the next `count` answers in the order of the clock, fewer where nobody is at work any more.

        After each but the last, `refill` is called with the client that has answered, and what it returns is begun.
        """
        coming: list[tuple[int, _TimedJob]] = []
        while self._at_work and len(coming) < count:
            i = min(self._at_work, key=lambda i: (self._at_work[i].due, i))
            coming.append((i, self._at_work.pop(i)))
            self.now = coming[-1][1].due
            if len(coming) < count:
                self.begin(refill(i), {})
        answers = dict(self._fleet.train({i: sent.job for i, sent in coming if not sent.is_lost}))
        silent = _silence(self._policy.deadline)
        yield from ((i, silent if sent.is_late else answers.get(i, LOST)) for i, sent in coming)

    def _timed(self, jobs: Mapping[int, Job], began: Mapping[int, float]) -> dict[int, _TimedJob]:
        """What becomes of these jobs, which are sent now or were at the given moments."""
        clients = {client.id: client for client in self.clients()}
        found = {}
        for i, job in jobs.items():
            trace = self._traces[i]
            due = round(trace.due(began.get(i, self.now), work(job, clients[i])), 3)
            is_lost = Random(f"{self._seed}/dropout/{i}/{job.round}").random() < trace.dropout
            found[i] = _TimedJob(job, due, is_lost)
        return found
