"""Many clients in one pass over one resident base: the engine of choice on one machine.

A round's jobs are begun one after another, trained together, and ended one after another; what a client does around
its training is the same as in `Serial`. They go through in blocks of bounded memory. A job that has to be trained by
itself is trained as in `Serial`, and a warning says why, once a run.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner, Steps
from fedlora.client.stacked import evaluation, together
from fedlora.client.training import Outcome, TrainingTask, begin, end
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure
from fedlora.jobs import Client, Job, SecAggStep, Update
from fedlora.messages.parts import Parts, PartTracker
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.server.aggregation import Answers
from fedlora.simulations.local_clients import REFUSALS, LocalClients, MakeRunner, send

MOST_CLIENTS = 256  # in a block: a private one holds an open file
P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("fedlora")


@dataclass(frozen=True, eq=False)
class _BegunJob:
    """A job that is to be trained, and goes on after that."""

    client: int
    steps: Steps
    task: TrainingTask


@dataclass(frozen=True, eq=False)
class _Block:
    """The jobs that are under way together."""

    jobs: list[_BegunJob] = field(default_factory=list)
    ledgers: set[Path] = field(default_factory=set)  # that they hold

    def has_room(self, job: Job, ledger: Path | None) -> bool:
        """May this job begin before the others end? Not where it would wait for a ledger that one of them holds."""
        most = together.MOST_BYTES // together.memory(job)
        return ledger not in self.ledgers and len(self.jobs) < max(1, min(most, MOST_CLIENTS))


class Stacked:
    """A fleet of clients that train together in this process, by one model."""

    def __init__(
        self,
        model: Model,
        clients_data: Sequence[ClientData],
        ranks: Sequence[int],
        folder: Path,
        answered: Callable[[int], None] = lambda _: None,
        policy: ClientPolicy = ClientPolicy(),  # noqa: B008
        make: MakeRunner = JobRunner,
    ) -> None:
        self.traffic = PartTracker()
        self._model, self._answered = model, answered
        self._clients = LocalClients(clients_data, ranks, folder, policy, make)
        self._said = set[str]()  # why jobs were trained by themselves

    def clients(self) -> Sequence[Client]:
        """All clients, with their counts and ranks."""
        return self._clients.known

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job; yield each answer as soon as it is there."""
        parts, waiting = Parts(), deque(jobs.items())
        while waiting:
            with ExitStack() as opened:  # a job that is given up half-way leaves no ledger locked
                block = _Block()
                for i, answer in self._begin(block, waiting, parts, opened):
                    yield i, self._note(i, answer)
                for job, outcome in self._trained(block.jobs):
                    yield job.client, self._note(job.client, _or_failure(end, job.steps, outcome))

    def _begin(self, block: _Block, waiting: deque[tuple[int, Job]], parts: Parts, opened: ExitStack) -> Answers:
        """Begin as many jobs as a block has room for; yield the answers of those that need no training."""
        while waiting:
            i, job = waiting[0]
            runner = self._clients.runner(i)
            ledger = runner.ledger.folder.resolve() if job.privacy else None
            if not block.has_room(job, ledger):
                return
            waiting.popleft()
            steps = opened.enter_context(closing(runner.steps(self._model, job, send(self.traffic, parts, i, job))))
            begun = _or_failure(begin, steps)
            if isinstance(begun, TrainingTask):
                block.jobs.append(_BegunJob(i, steps, begun))
                block.ledgers.update({ledger} if ledger else ())
            else:
                yield i, begun

    def _note(self, client: int, answer: Update | Failure) -> Update | Failure:
        """Count an answer that has come; return it."""
        if isinstance(answer, Update):
            self.traffic.receive(answer)
        self._answered(client)
        return answer

    def _trained(self, jobs: Sequence[_BegunJob]) -> Iterator[tuple[_BegunJob, Outcome]]:
        """Train these jobs; yield each with what came of it."""
        outcomes = together.perform(self._model, [job.task for job in jobs], self._warn)
        return ((jobs[place], outcome) for place, outcome in outcomes)

    def _warn(self, why: str) -> None:
        """Say, once a run, why jobs are trained by themselves."""
        if why not in self._said:
            self._said.add(why)
            log.warning("clients are trained one after another: %s", why)

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation; the result is what each says."""
        return self._clients.ask(asks)

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Measure the model of every job, with what its client keeps, on that client's held-out examples."""
        tasks = self._clients.own_models(jobs, self.traffic)
        return dict(zip(jobs, evaluation.evaluate(self._model, tasks), strict=True))


def _or_failure(go_on: Callable[P, T], *args: P.args, **named: P.kwargs) -> T | Failure:
    """What a job comes to, or its client's failure."""
    try:
        return go_on(*args, **named)
    except REFUSALS as e:
        return Failure.because_of(e)
