"""The subject of a record-level audit: a run's model, strategy and DP parameters, and rounds with two made-up clients.

The rounds go through `fit`, and the clients through their job runners with a ledger each on a temporary disk, as in
every run. Three things differ. The plan is short, and the noise is what the run's epsilon asks for over this plan, so
that a few seconds spend the whole budget. Clients step by plain SGD, from which the noisy gradients can be read off;
momentum, AdamW, a schedule and FedProx would use these gradients alone, which changes no promise. And wrappers around
the strategy on the server are left out, as they see no more than clients send. A run that masks its updates is audited
as if the server saw each update.
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
class RecordLevelSubject:
    """The parts of a client that are audited: as they are, or with a bug planted in one, which the audit must find."""

    mechanism: Mechanism = STANDARD
    runner: type[JobRunner] = JobRunner


@dataclass(frozen=True, eq=False)
class MadeUpClient(ClientData):
    """A client whose data are made-up examples, a record each."""

    examples: Sequence[Example] = ()

    @cached_property
    def records(self) -> Sequence[Sequence[Example]]:
        """Every example as a record of its own."""
        return [[e] for e in self.examples]

    @cached_property
    def fingerprint(self) -> str:
        """The same for all made-up data."""
        return "made up"

    def client(self, id: int, rank: int) -> Client:
        """Return what the server knows of this client."""
        return Client(id=id, examples=len(self.examples), rank=rank, records=len(self.examples))


@dataclass(frozen=True, eq=False)
class ObservedRound:
    """One client's round, observed from outside."""

    client: int
    job: Job
    sums: Mapping[tuple[str, str], Tensor]  # (side, module) -> sum of the noisy gradient sums of all steps
    visible: Mapping[tuple[str, str], Tensor]  # the part of them that the server can see
    drawn: Floats  # number of records in each step
    epsilon: float  # by its ledger, after the round

    @cached_property
    def vector(self) -> Floats:
        """All numbers of `sums` as one vector."""
        return as_vector(self.sums)

    @cached_property
    def visible_vector(self) -> Floats:
        """All numbers of `visible` in the places of `vector`, with zeros for those that the server does not see."""
        return as_vector({key: self.visible.get(key, torch.zeros_like(t)) for key, t in self.sums.items()})


@dataclass(frozen=True, eq=False)
class RecordLevelSetting:
    """Everything that is audited: a model, a strategy, and the DP-SGD of its clients."""

    config: Config
    model: Model
    start: LoRA
    strategy: Strategy[Any]
    dp: RecordLevelDP
    canaries: int
    seed: int = 0

    @property
    def records(self) -> int:
        """N: the number of records of either client."""
        return RECORDS + self.canaries

    @property
    def privacy(self) -> PrivacyTerms:
        """The DP-SGD parameters of either client."""
        return self.dp.terms_for(self.client)

    @property
    def client(self) -> Client:
        """One of the two clients, as the server knows it."""
        return _client(self.config, records=self.records)

    def described(self) -> dict[str, float]:
        """Return the numbers of the audit's own plan, for its findings."""
        p = self.privacy
        plan = {"noise": p.noise, "rate": p.rate, "steps": p.steps, "delta": p.delta, "rounds": self.dp.rounds}
        return plan | {"records": self.records, "canaries": self.canaries}

    def plan(self, records: int, rounds: int = ROUNDS) -> Plan:
        """Return the plan of a run with two clients of so many records each.

        The learning rate is such that the noise of one step moves each number by `MOVE`.
        """
        p = self.privacy
        lr = MOVE * p.rate * records / (p.noise * p.clip)
        training = replace(self.dp.training, lr=lr)
        return Plan(rounds, cohort=2, seed=self.config.seed, training=training, metrics=False, record_level=self.dp)

    def made_up(self, client: int) -> list[Example]:
        """Return a client's examples: short ones and a long one, as lengths betray a loss that couples records."""
        with seeded(derive(self.seed, "records", client)):
            short = [e for _ in range(3) for e in preflight.synthetic(self.model.encoder, 3)]
            return [*short[: RECORDS - 1], preflight.synthetic(self.model.encoder, 12)[-1]]


def model_and_strategy(config: Config) -> tuple[Model, LoRA, Strategy[Any]]:
    """Return the model with its adapter attached, that adapter, and the strategy for it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    schema = schemas.schema_of(config)
    model = Model(config.model, config.lora, schema, config.seed, federated.public_rows(config.lora.init_data, schema))
    start = model.get_adapter()
    return model, start, compose(replace(config, aggregate=AggregateConfig()), start)


def record_level_setting(config: Config, seed: int = 0) -> RecordLevelSetting:
    """Return the subject of a record-level audit of these settings. Raises what a run of them would raise."""
    model, start, strategy = model_and_strategy(config)
    first = strategy.client_init(strategy.init(start), _client(config, records=1))
    trained = first.start.only(first.trains).numel()
    count = int(min(CANARIES, canaries.room(first), ROOM / (RATE * ROUNDS * STEPS * trained)))
    setting = RecordLevelSetting(config, model, start, strategy, _short_plan_dp(config, RECORDS + count), count, seed)
    preflight.check_once(model, replace(select_rows(first), privacy=setting.privacy))
    return setting


def _client(config: Config, *, records: int) -> Client:
    return Client(id=0, examples=records, rank=config.lora.rank, records=records)


def _short_plan_dp(config: Config, records: int) -> RecordLevelDP:
    dp = replace(config.dp, rate=RATE, joins=0, budget=inf, ledger="")
    dp = replace(dp, delta=dp.delta if dp.delta < 1 / records else 0.0)
    training = Training(optimizer="sgd", steps=STEPS, batch_size=config.train.batch_size)
    return record_level_dp(dp, training, ROUNDS, [_client(config, records=records)])


def play(
    setting: RecordLevelSetting,
    subject: RecordLevelSubject,
    clients_data: Sequence[ClientData],
    folder: Path,
    rounds: int = ROUNDS,
) -> list[ObservedRound]:
    """Run so many rounds with two clients, and return each round of each as observed.

    Raises `PrivacyError` where a client refuses.
    """
    fleet = _Observed(setting, subject, clients_data, folder)
    for _ in fit(setting.strategy, fleet, setting.start, setting.plan(len(clients_data[0].records), rounds)):
        pass
    return fleet.seen


class _Observed(Serial):
    """Two clients in this process, whose work is observed."""

    def __init__(
        self, setting: RecordLevelSetting, subject: RecordLevelSubject, clients_data: Sequence[ClientData], folder: Path
    ) -> None:
        super().__init__(setting.model, clients_data, [setting.config.lora.rank] * len(clients_data), folder)
        self.seen: list[ObservedRound] = []
        self._setting, self._subject, self._folder = setting, subject, folder

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, job in jobs.items():
            drawn: list[int] = []
            where = canaries.places(job, self._setting.canaries, self._setting.seed)
            folder, mechanism = self._folder / str(i), _tapped(self._subject.mechanism, drawn, where)
            self._runners[i] = self._subject.runner(i, self._clients_data[i], folder, mechanism=mechanism)
            before = ClientState(folder).before(job.round).over(job.start)
            for _, answer in super().train({i: job}):
                if isinstance(answer, Failure):
                    raise PrivacyError(f"client {i} refused in round {job.round + 1}: {answer.reason}")
                self._look(i, job, before, answer, drawn)
                yield i, answer

    def _look(self, i: int, job: Job, before: LoRA, answer: Update, drawn: list[int]) -> None:
        """Note what the client did to the model, whatever it reports."""
        after, p = self._model.get_adapter(), self._setting.privacy
        unit = -p.rate * len(self._clients_data[i].records) / job.training.lr
        sums = {key: unit * t for key, t in _moved(after, before, job.trains)}
        observed = ObservedRound(
            client=i,
            job=job,
            sums=sums,
            visible={key: unit * t for key, t in _visible(answer.lora, job)},
            drawn=np.array(drawn, dtype=np.float64),
            epsilon=answer.spent.epsilon if answer.spent else inf,
        )
        self.seen.append(observed)


def _tapped(mechanism: Mechanism, drawn: list[int], where: NDArray[np.int64]) -> Mechanism:
    """Return the mechanism, which now notes in `drawn` how many records each step draws, and knows canaries."""

    def draw(numbers: Any, n: int, rate: float) -> list[int]:
        chosen = mechanism.draw(numbers, n, rate)
        drawn.append(len(chosen))
        return chosen

    return replace(mechanism, draw=draw, engine=canaries.engine(mechanism, where))


def _moved(after: LoRA, before: LoRA, sides: str) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for s in sides:
        for m, t in after.side(s).items():
            yield (s, m), t.double() - before.side(s)[m].double()


def _visible(lora: LoRA, job: Job) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield by how much each shared matrix moved, as far as the server can tell."""
    for s in job.shares:
        for m, t in lora.side(s).items():
            was = job.start.side(s)[m].double()
            if t.shape == was.shape:
                yield (s, m), t.double() - was
            elif s == "A":  # from a client that resumes, which sends [A'; A] and [B', -B]
                yield (s, m), t[: len(t) // 2].double() - t[len(t) // 2 :].double()
            else:
                yield (s, m), t[:, : t.shape[1] // 2].double() + t[:, t.shape[1] // 2 :].double()


def as_vector(some: Mapping[tuple[str, str], Tensor]) -> Floats:
    """Return all numbers as one vector, in the order of sides and modules."""
    return np.concatenate([t.flatten().numpy() for t in some.values()])
