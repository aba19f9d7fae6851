"""One client after another in this process, over one resident base: the reference that other fleets answer to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedlora.client import training
from fedlora.client.policy import Own
from fedlora.client.runner import Desk
from fedlora.data.client_data import Site
from fedlora.errors import ClientFailed, Failure, LedgerError, PrivacyError, SecureError
from fedlora.jobs import Ask, Client, Job
from fedlora.messages.parts import Parts, Traffic
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.server.aggregation import Answers
from fedlora.storage.client_state import Store

REFUSALS = ClientFailed, LedgerError, PrivacyError, SecureError  # one client's; the round goes on without it


class Serial:
    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        ranks: Sequence[int],
        folder: Path,
        answered: Callable[[int], None] = lambda _: None,
        own: Own = Own(),  # noqa: B008
    ) -> None:
        self.traffic = Traffic()
        self._model, self._sites, self._ranks, self._answered = model, sites, ranks, answered
        self._desks = [Desk(i, site, folder / str(i), own) for i, site in enumerate(sites)]

    def clients(self) -> Sequence[Client]:
        return [site.client(i, rank) for i, (site, rank) in enumerate(zip(self._sites, self._ranks, strict=True))]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        parts = Parts()
        for i, job in jobs.items():
            self.traffic.send(i, parts.of(job))
            try:
                update = self._desks[i].answer(self._model, job)
            except REFUSALS as e:
                self._answered(i)
                yield i, Failure.because_of(e)
            else:
                self.traffic.receive(update)
                self._answered(i)
                yield i, update

    def ask(self, asks: Mapping[int, Ask]) -> Mapping[int, Mapping[str, str] | Failure]:
        replies: dict[int, Mapping[str, str] | Failure] = {}
        for i, ask in asks.items():
            try:
                replies[i] = self._desks[i].reply(ask)
            except SecureError as e:
                replies[i] = Failure.because_of(e)
        return replies

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        parts = Parts()
        answers = {}
        for i, job in jobs.items():
            self.traffic.send(i, parts.of(job))
            kept = Store(self._desks[i].folder).before(job.round + 1)
            answers[i] = training.evaluate(self._model, job, self._sites[i].heldout, kept)
        return answers
