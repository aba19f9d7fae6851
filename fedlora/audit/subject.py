"""What is audited: the run's model, strategy and terms, with two clients of made-up records, and rounds really played.

The rounds go through `rounds.fit`, the clients through their desks, with a ledger each on a temporary disk: the path of
every run. Three things are the audit's own. The plan is short, and the noise is what the run's epsilon asks for over
this plan, so that a few seconds spend the whole budget. Clients step by plain SGD, from which the noisy gradients can
be read off; momentum, AdamW, a schedule and FedProx would work on these alone, which changes no promise. And what goes
round the strategy on the server is left away, as it comes after what clients send. A run that masks its updates is
audited as if the server saw each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.client.runner import JobRunner
from fedlora.config import Config
from fedlora.data import federated
from fedlora.data.client_data import ClientData
from fedlora.data.encoding import Example
from fedlora.errors import Failure, PrivacyError
from fedlora.jobs import Client, Job, PrivacyTerms, Update
from fedlora.lora import LoRA
from fedlora.messages.sketch import select_rows
from fedlora.models.model import Model
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.privacy.record_level import RecordLevelDP, record_level_dp
from fedlora.run.compose import compose
from fedlora.run.plan import Plan
from fedlora.sections import AggregateConfig, Training
from fedlora.seeds import derive, seeded
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.storage.client_state import ClientState
from fedlora.strategy import Strategy

from . import canaries, schemas
from .statistics import Floats

ROUNDS, STEPS, RATE = 3, 10, 0.25
RECORDS = 8  # of each client, besides its canaries
CANARIES = 1200
ROOM = 2e9  # numbers in the gradients of all canaries that are drawn: above, there are fewer canaries
MOVE = 0.01  # the deviation of a trained number by the noise of one step


@dataclass(frozen=True)
class Subject:
    """The product as it is; or with a bug in one of its parts, which the audit must find."""

    mechanism: Mechanism = STANDARD
    runner: type[JobRunner] = JobRunner


@dataclass(frozen=True, eq=False)
class Made(ClientData):
    """A client whose examples are made up, a record each."""

    examples: Sequence[Example] = ()

    @cached_property
    def records(self) -> Sequence[Sequence[Example]]:
        return [[e] for e in self.examples]

    @cached_property
    def fingerprint(self) -> str:
        return "made up"

    def client(self, id: int, rank: int) -> Client:
        return Client(id, len(self.examples), rank, len(self.examples))


@dataclass(frozen=True, eq=False)
class ObservedRound:
    """One client's round, seen from outside."""

    client: int
    job: Job
    sums: Mapping[tuple[str, str], Tensor]  # (side, module) -> what it stepped along over the round, times q N
    told: Mapping[tuple[str, str], Tensor]  # as much of that as the server can see
    drawn: Floats  # records in each step
    epsilon: float  # what its ledger then said

    @cached_property
    def all(self) -> Floats:
        return flat(self.sums)

    @cached_property
    def sent(self) -> Floats:
        """As long as `all`, with zeros for what the server does not see."""
        return flat({key: self.told.get(key, torch.zeros_like(t)) for key, t in self.sums.items()})


@dataclass(frozen=True, eq=False)
class Stage:
    """A model, a strategy, and the terms of its clients."""

    config: Config
    model: Model
    start: LoRA
    strategy: Strategy[Any]
    terms: RecordLevelDP
    canaries: int
    seed: int = 0

    @property
    def records(self) -> int:
        """N, of either client."""
        return RECORDS + self.canaries

    @property
    def privacy(self) -> PrivacyTerms:
        return self.terms.of(self.client)

    @property
    def client(self) -> Client:
        return Client(0, self.records, self.config.lora.rank, self.records)

    def plan(self, records: int, rounds: int = ROUNDS) -> Plan:
        """Rounds of two clients with so many records, in steps by which noise moves a number by `MOVE`."""
        p = self.privacy
        lr = MOVE * p.rate * records / (p.noise * p.clip)
        training = replace(self.terms.training, lr=lr)
        return Plan(rounds, cohort=2, seed=self.config.seed, training=training, metrics=False, terms=self.terms)

    def made_up(self, client: int) -> list[Example]:
        """A client's examples: short ones, and a long one, as a loss that couples records shows by their lengths."""
        with seeded(derive(self.seed, "records", client)):
            short = [e for _ in range(3) for e in preflight.synthetic(self.model.encoder, 3)]
            return [*short[: RECORDS - 1], preflight.synthetic(self.model.encoder, 12)[-1]]


def worn(config: Config) -> tuple[Model, LoRA, Strategy[Any]]:
    """The model with its adapter, that adapter, and the strategy for it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    form = schemas.of(config)
    model = Model(config.model, config.lora, form, config.seed, federated.public_rows(config.lora.init_data, form))
    start = model.get_adapter()
    return model, start, compose(replace(config, aggregate=AggregateConfig()), start)


def build(config: Config, seed: int = 0) -> Stage:
    """Everything that an audit of these settings needs. Raises what a run of them would raise."""
    model, start, strategy = worn(config)
    first = strategy.client_init(strategy.init(start), Client(0, 1, config.lora.rank, 1))
    trained = first.start.only(first.trains).numel()
    count = int(min(CANARIES, canaries.room(first), ROOM / (RATE * ROUNDS * STEPS * trained)))
    stage = Stage(config, model, start, strategy, _terms(config, RECORDS + count), count, seed)
    preflight.check_once(model, replace(select_rows(first), privacy=stage.privacy))
    return stage


def _terms(config: Config, records: int) -> RecordLevelDP:
    dp = replace(config.dp, rate=RATE, joins=0, budget=inf, ledger="")
    dp = replace(dp, delta=dp.delta if dp.delta < 1 / records else 0.0)
    training = Training(optimizer="sgd", steps=STEPS, batch_size=config.train.batch_size)
    return record_level_dp(dp, training, ROUNDS, [Client(0, records, config.lora.rank, records)])


def play(
    stage: Stage, subject: Subject, clients_data: Sequence[ClientData], folder: Path, rounds: int = ROUNDS
) -> list[ObservedRound]:
    """So many rounds of two clients, and what was seen of each. Raises `PrivacyError` where a client refuses."""
    fleet = _Watched(stage, subject, clients_data, folder)
    for _ in fit(stage.strategy, fleet, stage.start, stage.plan(len(clients_data[0].records), rounds)):
        pass
    return fleet.seen


class _Watched(Serial):
    """Two clients in this process, and what is seen of their work."""

    def __init__(self, stage: Stage, subject: Subject, clients_data: Sequence[ClientData], folder: Path) -> None:
        super().__init__(stage.model, clients_data, [stage.config.lora.rank] * len(clients_data), folder)
        self.seen: list[ObservedRound] = []
        self._stage, self._subject, self._folder = stage, subject, folder

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, job in jobs.items():
            drawn: list[int] = []
            where = canaries.places(job, self._stage.canaries, self._stage.seed)
            folder, mechanism = self._folder / str(i), _tapped(self._subject.mechanism, drawn, where)
            self._runners[i] = self._subject.runner(i, self._clients_data[i], folder, mechanism=mechanism)
            before = ClientState(folder).before(job.round).over(job.start)
            for _, answer in super().train({i: job}):
                if isinstance(answer, Failure):
                    raise PrivacyError(f"client {i} refused in round {job.round + 1}: {answer.reason}")
                self._look(i, job, before, answer, drawn)
                yield i, answer

    def _look(self, i: int, job: Job, before: LoRA, answer: Update, drawn: list[int]) -> None:
        """Read off what the client did, whatever it says."""
        after, p = self._model.get_adapter(), self._stage.privacy
        unit = -p.rate * len(self._clients_data[i].records) / job.training.lr
        sums = {key: unit * t for key, t in _moved(after, before, job.trains)}
        told = {key: unit * t for key, t in _shown(answer.lora, job)}
        spent = answer.spent.epsilon if answer.spent else inf
        self.seen.append(ObservedRound(i, job, sums, told, np.array(drawn, dtype=np.float64), spent))


def _tapped(mechanism: Mechanism, drawn: list[int], where: NDArray[np.int64]) -> Mechanism:
    """The mechanism, with how many records each step draws written down, and canaries known."""

    def draw(numbers: Any, n: int, rate: float) -> list[int]:
        chosen = mechanism.draw(numbers, n, rate)
        drawn.append(len(chosen))
        return chosen

    return replace(mechanism, draw=draw, engine=canaries.engine(mechanism, where))


def _moved(after: LoRA, before: LoRA, sides: str) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for s in sides:
        for m, t in after.side(s).items():
            yield (s, m), t.double() - before.side(s)[m].double()


def _shown(lora: LoRA, job: Job) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """By how much each shared number moved, as the server can tell it."""
    for s in job.shares:
        for m, t in lora.side(s).items():
            was = job.start.side(s)[m].double()
            if t.shape == was.shape:
                yield (s, m), t.double() - was
            elif s == "A":  # of a client that resumes: [A'; A] and [B', -B]
                yield (s, m), t[: len(t) // 2].double() - t[len(t) // 2 :].double()
            else:
                yield (s, m), t[:, : t.shape[1] // 2].double() + t[:, t.shape[1] // 2 :].double()


def flat(some: Mapping[tuple[str, str], Tensor]) -> Floats:
    """All numbers in a row, in the order of sides and modules."""
    return np.concatenate([t.flatten().numpy() for t in some.values()])
