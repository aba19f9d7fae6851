"""A strategy in a small federation: the round loop runs, and between rounds single clients can be looked at."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedlora.errors import StrategyError
from fedlora.jobs import why_rows_cannot_stay
from fedlora.lora import LoRA, Side
from fedlora.messages.sketch import select_rows
from fedlora.run.plan import Plan, RoundResult, job_for
from fedlora.sections import Training
from fedlora.server.rounds import Fleet, fit
from fedlora.simulations.serial import Serial
from fedlora.strategy import Client, Job, Strategy, Update

from .random_clients import added, fresh, offset_under
from .small_models import RANK, Adapter, Fleets, Kind, SmallModel, small_model

ALIKE = (RANK, RANK, RANK)
MIXED = (1, RANK, RANK)
RANKS_TRIED = (RANK, 4, 8)  # the second is that of the checks on random factors
TRAINING = Training(lr=1e-2, steps=2, batch_size=4)  # from B = 0 the first step moves B alone, the second A too
PLAN = Plan(rounds=2, cohort=len(ALIKE), training=TRAINING)


@dataclass(frozen=True, eq=False)
class SmallFederation:
    """A strategy, a small model and the fleet of its clients."""

    strategy: Strategy[Any]
    small: SmallModel
    fleet: Fleet
    plan: Plan = PLAN

    def played(self) -> list[RoundResult]:
        """All rounds of the plan."""
        return list(fit(self.strategy, self.fleet, self.small.start, self.plan))

    def after(self) -> tuple[Any, dict[int, Job]]:
        """The state when all rounds are over, and the jobs of a round that would follow."""
        state = self.played()[-1].state
        return state, self.jobs(state, self.plan.rounds)

    def states(self) -> Iterator[tuple[int, Any]]:
        """Every round to come and the state before it: a client asked for it here does it again in the loop."""
        yield 0, self.strategy.init(self.small.start)
        for done in fit(self.strategy, self.fleet, self.small.start, self.plan):
            yield done.number, done.state

    def jobs(self, state: Any, t: int) -> dict[int, Job]:
        """The jobs of all clients for round t, as they are sent."""
        clients = self.fleet.clients()
        return {c.id: select_rows(job_for(self.strategy, state, c, self.plan, t)) for c in clients}

    def first_jobs(self) -> Iterator[tuple[int, Job]]:
        """Every round to come and the job of client 0 in it."""
        for t, state in self.states():
            yield t, self.jobs(state, t)[0]

    def load(self, i: int, job: Job) -> LoRA:
        """Have client i load the model that it would use for the job; the adapter that is then loaded."""
        self.fleet.evaluate({i: job})
        return self.small.model.get_adapter()

    def train(self, i: int, job: Job) -> tuple[Update, LoRA]:
        """Have client i do the job; its update, and its adapter at the end of training."""
        update = dict(self.fleet.train({i: job}))[i]
        if not isinstance(update, Update):
            raise AssertionError(f"{self.strategy}: client {i} failed in round {job.round}: {update.reason}")
        return update, self.small.model.get_adapter()


def model_for(strategy: Strategy[Any], kind: Kind, adapter: Adapter = "lora") -> SmallModel:
    """The small model of this kind at the lowest rank that the strategy takes, or at `RANK` where it takes none."""
    return small_model(kind, adapter, next((rank for rank in RANKS_TRIED if _takes(strategy, rank)), RANK))


def _takes(strategy: Strategy[Any], rank: int) -> bool:
    """Can what the strategy asks of clients of this rank be done, and does it not refuse the rank?"""
    try:
        job = strategy.client_init(strategy.init(fresh(rank=rank)), Client(0, 1, rank))
    except StrategyError:
        return False
    return not why_rows_cannot_stay(job)


def alike(small: SmallModel) -> tuple[int, ...]:
    """The ranks of clients that all have the model's."""
    return (small.lora.rank,) * len(ALIKE)


def mixed(small: SmallModel) -> tuple[int, ...]:
    """The ranks of clients of which the first has a lower one than the model."""
    return (1, *alike(small)[1:])


@contextmanager
def small_federation(
    strategy: Strategy[Any], small: SmallModel, fleets: Fleets = Serial, ranks: Sequence[int] = (), plan: Plan = PLAN
) -> Iterator[SmallFederation]:
    """A fleet of as many clients as there are ranks, three of the model's own if none are given.

    It lies on a disk that is removed afterwards.
    """
    ranks = ranks or alike(small)
    overrides = strategy.client_init(strategy.init(small.start), Client(0, 1, ranks[0])).overrides
    if overrides.get("optimizer") == "sgd":  # whose steps are as short as its gradients
        plan = replace(plan, training=replace(plan.training, lr=100 * plan.training.lr))
    with TemporaryDirectory() as folder:
        fleet = fleets(small.model, small.clients[: len(ranks)], ranks, Path(folder))
        yield SmallFederation(strategy, small, fleet, plan)


def model_of(job: Job, start: LoRA, now: LoRA) -> Side:
    """Everything that a client adds to the pretrained weights which started the job with `start` and has `now`."""
    return added(job, now, offset_under(job, start))
