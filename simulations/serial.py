"""One client after another in this process, over one resident base: the reference that other fleets answer to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora import worker
from fedlora.errors import ClientFailed
from fedlora.flat import Parts, Traffic
from fedlora.metrics import Metrics
from fedlora.model import Model
from fedlora.rounds import Answers, Failure
from fedlora.store import Store
from fedlora.strategy import Client, Job
from fedlora.worker import Site


class Serial:
    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        ranks: Sequence[int],
        folder: Path,
        answered: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.traffic = Traffic()
        self._model, self._sites, self._ranks, self._answered = model, sites, ranks, answered
        self._stores = [Store(folder / str(i)) for i in range(len(sites))]

    def clients(self) -> Sequence[Client]:
        return [site.client(i, rank) for i, (site, rank) in enumerate(zip(self._sites, self._ranks, strict=True))]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        parts = Parts()
        for i, job in jobs.items():
            self.traffic.send(i, parts.of(job))
            before = self._stores[i].before(job.round)
            try:
                update, kept = worker.train(self._model, job, i, self._sites[i].train, before)
            except ClientFailed as e:
                self._answered(i)
                yield i, Failure(str(e))
            else:
                self._stores[i].keep(job.round, kept)
                self.traffic.receive(update)
                self._answered(i)
                yield i, update

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        parts = Parts()
        answers = {}
        for i, job in jobs.items():
            self.traffic.send(i, parts.of(job))
            kept = self._stores[i].before(job.round + 1)
            answers[i] = worker.evaluate(self._model, job, self._sites[i].heldout, kept)
        return answers
