"""One client after another in this process, over one resident base: the reference that other fleets answer to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.client import training
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.encoding.client_data import ClientData
from fedlora.errors import ClientFailed, DataError, Failure, LedgerError, PrivacyError, SecureError
from fedlora.jobs import Client, Job, SecAggStep
from fedlora.messages.parts import Parts, PartTracker, job_hash, part_names
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.run.answers import AnswerEvaluation, ScoredAnswer
from fedlora.server.aggregation import Answers
from fedlora.storage.client_state import ClientState

REFUSALS = ClientFailed, DataError, LedgerError, PrivacyError, SecureError  # one client's; the round goes on without it


def own_answers(evaluation: AnswerEvaluation, jobs: Mapping[int, Job], folder: Path) -> list[ScoredAnswer]:
    """The answers of every job's model, with what its client keeps in `folder`, each to its share of the prompts."""
    answers: list[ScoredAnswer] = []
    for n, (i, job) in enumerate(jobs.items()):
        training.load_start(evaluation.model, job, ClientState(folder / str(i)).before(job.round + 1))
        share = replace(evaluation, prompts=evaluation.prompts[n :: len(jobs)])
        answers += share.present_answers()
    return answers


class Serial:
    """A fleet of clients that train one after another in this process, by one model."""

    def __init__(
        self,
        model: Model,
        clients_data: Sequence[ClientData],
        ranks: Sequence[int],
        folder: Path,
        answered: Callable[[int], None] = lambda _: None,
        policy: ClientPolicy = ClientPolicy(),  # noqa: B008
    ) -> None:
        self.traffic = PartTracker()
        self._model, self._clients_data, self._ranks, self._answered = model, clients_data, ranks, answered
        self._runners = [
            JobRunner(i, client_data, folder / str(i), policy) for i, client_data in enumerate(clients_data)
        ]

    def clients(self) -> Sequence[Client]:
        """All clients, with their counts and ranks."""
        return [
            client_data.client(i, rank)
            for i, (client_data, rank) in enumerate(zip(self._clients_data, self._ranks, strict=True))
        ]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job; yield each answer as soon as it is there."""
        parts = Parts()
        for i, job in jobs.items():
            own_parts = parts.of(job)
            self.traffic.send(i, own_parts)
            start, offset = part_names(own_parts)
            try:
                update = self._runners[i].run(self._model, job, job_hash(job, start=start, offset=offset))
            except REFUSALS as e:
                self._answered(i)
                yield i, Failure.because_of(e)
            else:
                self.traffic.receive(update)
                self._answered(i)
                yield i, update

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation; the result is what each says."""
        replies: dict[int, Mapping[str, str] | Failure] = {}
        for i, ask in asks.items():
            try:
                replies[i] = self._runners[i].reply(ask)
            except SecureError as e:
                replies[i] = Failure.because_of(e)
        return replies

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Measure the model of every job, with what its client keeps, on that client's held-out examples."""
        parts = Parts()
        answers = {}
        for i, job in jobs.items():
            self.traffic.send(i, parts.of(job))
            kept = ClientState(self._runners[i].folder).before(job.round + 1)
            answers[i] = training.evaluate(self._model, job, self._clients_data[i].heldout, kept)
        return answers
