"""The subject of a record-level audit: a run's model, strategy and DP parameters, and rounds with two made-up clients.

The rounds go through `fit`, and the clients through their job runners with a ledger each on a temporary disk, as in
every run. Three things differ. The plan is short, and the noise is what the run's epsilon asks for over this plan, so
that a few seconds spend the whole budget. Clients step by plain SGD, from which the noisy gradients can be read off;
momentum, AdamW, a schedule and FedProx would use these gradients alone, which changes no promise. And wrappers around
the strategy on the server are left out, as they see no more than clients send. A run that masks its updates is audited
as if the server saw each update.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import torch

from fedlora.client import handlers
from fedlora.client.runner import JobRunner
from fedlora.client.stacked import private
from fedlora.config import Config, engine_of
from fedlora.data import federated
from fedlora.encoding.client_data import ClientData
from fedlora.encoding.encoder import Example
from fedlora.errors import Failure, PrivacyError
from fedlora.jobs import (
    HIGHEST_RANK,
    Client,
    Job,
    PrivacyTerms,
    SecAggStep,
    Update,
    sent_sides,
    shared_part,
    start_with,
)
from fedlora.lora import LoRA
from fedlora.messages.sketch import select_rows
from fedlora.metrics import Metrics
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
from fedlora.simulations.stacked import Stacked
from fedlora.storage.client_state import ClientState
from fedlora.strategy import Sender, Strategy, declare, next_state

from . import canaries, schemas
from .observer import AnswerAgain, ObservedRound, StepObserver, moved, visible

ROUNDS, STEPS, RATE = 4, 10, 0.25
RECORDS = 11  # of each client, besides its canaries
CANARIES = 1200
ROOM = 2e9  # numbers in the gradients of all canaries that are drawn: above, there are fewer canaries
MOVE = 0.01  # the deviation of a trained number by the noise of one step


@dataclass(frozen=True)
class RecordLevelSubject:
    """The parts of a client that are audited: as they are, or with a bug planted in one, which the audit must find."""

    mechanism: Mechanism = STANDARD
    runner: type[JobRunner] = JobRunner
    handle: Callable[..., Any] = handlers.handle


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
class RecordLevelSetting:
    """Everything that is audited: a model, a strategy, and the DP-SGD of its clients."""

    config: Config
    model: Model
    start: LoRA
    strategy: Strategy[Any]
    dp: RecordLevelDP
    canaries: int
    stacked: bool  # do clients train in one pass?
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
        plan["stacked"] = self.stacked
        return plan | {"records": self.records, "canaries": self.canaries}

    def plan(self, records: int, rounds: int = ROUNDS) -> Plan:
        """Return the plan of a run with two clients of so many records each.

        The learning rate is such that the noise of one step moves each number by `MOVE`.
        """
        p = self.privacy
        lr = MOVE * p.rate * records / (p.noise * p.clip)
        training = replace(self.dp.training, lr=lr)
        return Plan(rounds, cohort=2, seed=self.config.seed, training=training, metrics=False, record_level=self.dp)

    @cached_property
    def made_up(self) -> tuple[list[Example], list[Example]]:
        """The examples of either client: short ones and a long one, as lengths betray a loss that couples records."""
        return self._made_up(0), self._made_up(1)

    def _made_up(self, client: int) -> list[Example]:
        with seeded(derive(self.seed, "records", client)):
            short = [e for _ in range(0, RECORDS, 3) for e in preflight.synthetic(self.model.encoder, 3)]
            return [*short[: RECORDS - 1], preflight.synthetic(self.model.encoder, 12)[-1]]


def model_and_strategy(config: Config) -> tuple[Model, LoRA, Strategy[Any]]:
    """Return the model with its adapter attached, that adapter, and the strategy for it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    schema = schemas.schema_of(config)
    model = Model(config.model, config.lora, schema, config.seed, federated.public_rows(config.lora.init_data, schema))
    start = model.get_adapter()
    strategy = compose(replace(config, aggregate=AggregateConfig()), start)
    return model, start, Unfiltered(Unprojected(strategy) if strategy.exchanges > 1 else strategy)


@dataclass(frozen=True)
class Unprojected(Strategy[Any]):
    """A strategy of two passes whose clients send the factors, of which the projections are functions.

    A server sees more so, and each number that is trained is seen as it is.
    """

    inner: Strategy[Any]

    def __post_init__(self) -> None:
        declare(self, self.inner, exchanges=1, sums_only=False, up="", down="")

    def init(self, lora: LoRA) -> Any:
        """Return the strategy's own state."""
        return self.inner.init(lora)

    def client_init(self, state: Any, client: Client) -> Job:
        """Return the strategy's job of a first pass, without the projection."""
        job = self.inner.client_init(state, client)
        return replace(job, shares=sent_sides(job), right={})

    def aggregate(self, state: Any, updates: Sequence[LoRA], weights: Sequence[float]) -> Any:
        """Return the strategy's own next state, after both passes."""
        for _ in range(self.inner.exchanges):
            job = self.inner.client_init(state, HIGHEST_RANK)
            state = self.inner.aggregate(state, [shared_part(job, update) for update in updates], weights)
        return state

    def adapter(self, state: Any) -> LoRA:
        """Return what the strategy delivers."""
        return self.inner.adapter(state)


@dataclass(frozen=True)
class Unfiltered(Strategy[Any]):
    """A strategy whose clients follow their gradients as they are: a filter on noised ones takes nothing from privacy.

    What an audit reads off the model is then the noised sum itself. Turns of several steps become turns of one.
    """

    inner: Strategy[Any]

    def __post_init__(self) -> None:
        declare(self, self.inner)

    def init(self, lora: LoRA) -> Any:
        """Return the strategy's own state."""
        return self.inner.init(lora)

    def client_init(self, state: Any, client: Client) -> Job:
        """Return the strategy's own job, without a filter."""
        job = self.inner.client_init(state, client)
        return replace(job, turns=job.each_turn if job.turns else (), smoothing=())

    def aggregate(
        self, state: Any, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> Any:
        """Return the strategy's own next state."""
        return next_state(self.inner, state, updates, weights, senders)

    def adapter(self, state: Any) -> LoRA:
        """Return what the strategy delivers."""
        return self.inner.adapter(state)


def record_level_setting(config: Config, seed: int = 0) -> RecordLevelSetting:
    """Return the subject of a record-level audit of these settings. Raises what a run of them would raise."""
    model, start, strategy = model_and_strategy(config)
    first = strategy.client_init(strategy.init(start), _client(config, records=1))
    trained = first.start.only(first.trains).numel()
    count = int(min(CANARIES, canaries.room(first), ROOM / (RATE * ROUNDS * STEPS * trained)))
    dp = _short_plan_dp(config, RECORDS + count)
    setting = RecordLevelSetting(config, model, start, strategy, dp, count, stacked=False, seed=seed)
    job = replace(select_rows(first), privacy=setting.privacy)
    preflight.check_once(model, job)
    return replace(setting, stacked=engine_of(config) == "stacked" and not private.why_not(model, job))


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
    *,
    rounds: int = ROUNDS,
    asked_twice: bool = False,
) -> list[ObservedRound]:
    """Run so many rounds with two clients, and return each round of each as observed.

    With `asked_twice` a client that has answered is asked the same job once more, as after a reply that was lost.
    Raises `PrivacyError` where a client refuses.
    """
    fleet = _Observed(setting, subject, clients_data, folder, asked_twice=asked_twice)
    for _ in fit(setting.strategy, fleet, setting.start, setting.plan(len(clients_data[0].records), rounds)):
        pass
    return fleet.seen


class _Observed:
    """Two clients in this process, whose work is observed, by the engine of the run."""

    def __init__(
        self,
        setting: RecordLevelSetting,
        subject: RecordLevelSubject,
        clients_data: Sequence[ClientData],
        folder: Path,
        *,
        asked_twice: bool,
    ) -> None:
        ranks, kind = [setting.config.lora.rank] * len(clients_data), Stacked if setting.stacked else Serial
        self._fleet = kind(setting.model, clients_data, ranks, folder, make=lambda i, *_: self._runners[i])
        self._runners: dict[int, JobRunner] = {}
        self.traffic, self._clients_data = self._fleet.traffic, clients_data
        self.seen: list[ObservedRound] = []
        self._setting, self._subject, self._folder, self._asked_twice = setting, subject, folder, asked_twice

    def clients(self) -> Sequence[Client]:
        """The clients, with their counts and ranks."""
        return self._fleet.clients()

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation."""
        return self._fleet.ask(asks)

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Measure the model of every job on its client's held-out examples."""
        return self._fleet.evaluate(jobs)

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job under observation; where jobs are asked twice, after all have been answered once."""
        before = {i: start_with(job, ClientState(self._folder / str(i)).before(job.round)) for i, job in jobs.items()}
        rounds = {i: self._observed(i, jobs[i], before[i], answer, by) for i, answer, by in self._ask(jobs)}
        for i, job in jobs.items():
            again = self._again(i, job, rounds[i].answer) if self._asked_twice else None
            self.seen.append(replace(rounds[i], again=again))
            yield i, rounds[i].answer

    def _ask(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, Update, StepObserver]]:
        """Have clients do their jobs under observation, each by a job runner of its own, as after a start."""
        observers = {i: self._observer(i, job) for i, job in jobs.items()}
        for i, answer in self._fleet.train(jobs):
            observers[i].finish()
            if isinstance(answer, Failure):
                raise PrivacyError(f"client {i} refused in round {jobs[i].round + 1}: {answer.reason}")
            yield i, answer, observers[i]

    def _observer(self, i: int, job: Job) -> StepObserver:
        """What observes the next job of a client."""
        client_data = self._clients_data[i]
        observer = StepObserver(self._setting.model, job, client_data.records, self._unit(i, job))
        where = canaries.places(job, self._setting.canaries, self._setting.seed)
        mechanism = observer.on(self._subject.mechanism, where)
        self._runners[i] = self._subject.runner(i, client_data, self._folder / str(i), mechanism=mechanism)
        return observer

    def _unit(self, i: int, job: Job) -> float:
        """The noisy sum of a step over the change that the step makes."""
        return -self._setting.privacy.rate * len(self._clients_data[i].records) / job.training.lr

    def _observed(self, i: int, job: Job, before: LoRA, answer: Update, observer: StepObserver) -> ObservedRound:
        """What a client did to its adapter, whatever it reports."""
        unit = observer.unit
        return ObservedRound(
            client=i,
            job=job,
            answer=answer,
            sums={key: unit * t for key, t in moved(observer.after, before, job.trains)},
            visible={key: unit * t for key, t in visible(answer.lora, job)},
            steps=observer.steps,
            dropout_seed=observer.dropout_seed,
            epsilon=answer.spent.epsilon if answer.spent else inf,
        )

    def _again(self, i: int, job: Job, answer: Update) -> AnswerAgain:
        ((_, second, observer),) = self._ask({i: job})
        return AnswerAgain(
            same=_is_same(answer.lora, second.lora),
            steps=len(observer.steps),
            charges=_charges(second) - _charges(answer),
        )


def _charges(update: Update) -> int:
    return update.spent.charges if update.spent else 0


def _is_same(x: LoRA, y: LoRA) -> bool:
    """Have these the same matrices, bit for bit?"""
    first, second = ({(s, m): t for s, m, t in lora.matrices()} for lora in (x, y))
    return first.keys() == second.keys() and all(torch.equal(t, second[key]) for key, t in first.items())
