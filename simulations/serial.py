"""One client after another in this process, over one resident base: the reference that other fleets answer to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.client import training
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.encoding.client_data import ClientData
from fedlora.errors import Failure
from fedlora.jobs import Client, Job, SecAggStep, Update
from fedlora.messages.parts import Parts, PartTracker
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.run.answers import AnswerEvaluation, ScoredAnswer
from fedlora.server.aggregation import Answers
from fedlora.simulations.local_clients import REFUSALS, LocalClients, MakeRunner, send
from fedlora.storage.own_model import own_model


def own_answers(evaluation: AnswerEvaluation, jobs: Mapping[int, Job], folder: Path) -> list[ScoredAnswer]:
    """The answers of every job's model, with what its client keeps in `folder`, each to its share of the prompts."""
    answers: list[ScoredAnswer] = []
    for n, (i, job) in enumerate(jobs.items()):
        training.load_start(evaluation.model, *own_model(job, folder / str(i)))
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
        make: MakeRunner = JobRunner,
    ) -> None:
        self.traffic = PartTracker()
        self._model, self._answered = model, answered
        self._clients = LocalClients(clients_data, ranks, folder, policy, make)

    def clients(self) -> Sequence[Client]:
        """All clients, with their counts and ranks."""
        return self._clients.known

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job; yield each answer as soon as it is there."""
        parts = Parts()
        for i, job in jobs.items():
            digest = send(self.traffic, parts, i, job)
            answer: Update | Failure
            try:
                answer = self._clients.runner(i).run(self._model, job, digest)
            except REFUSALS as e:
                answer = Failure.because_of(e)
            else:
                self.traffic.receive(answer)
            self._answered(i)
            yield i, answer

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation; the result is what each says."""
        return self._clients.ask(asks)

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Measure the model of every job, with what its client keeps, on that client's held-out examples."""
        tasks = self._clients.own_models(jobs, self.traffic)
        found = (training.evaluate(self._model, task.job, task.examples, task.kept) for task in tasks)
        return dict(zip(jobs, found, strict=True))
