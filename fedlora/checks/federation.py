"""A strategy at work in a small federation, through the round loop, with a look at single clients between rounds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedlora.lora import LoRA, Side, scale
from fedlora.messages.sketch import select_rows
from fedlora.run.plan import Plan, RoundResult
from fedlora.sections import Training
from fedlora.server.rounds import Fleet, fit, job_for
from fedlora.simulations.serial import Serial
from fedlora.strategy import Job, Strategy, Update

from .random_clients import added
from .small_models import RANK, Fleets, SmallModel

ALIKE = (RANK, RANK, RANK)
MIXED = (1, RANK, RANK)
TRAINING = Training(lr=1e-2, steps=2, batch_size=4)  # from B = 0 the first step moves B alone, the second A too
PLAN = Plan(rounds=2, cohort=len(ALIKE), training=TRAINING)


@dataclass(frozen=True, eq=False)
class Lab:
    """A strategy, a world and the fleet in it."""

    strategy: Strategy[Any]
    world: SmallModel
    fleet: Fleet
    plan: Plan = PLAN

    def played(self) -> list[RoundResult]:
        """All rounds of the plan."""
        return list(fit(self.strategy, self.fleet, self.world.start, self.plan))

    def after(self) -> tuple[Any, dict[int, Job]]:
        """The state when all rounds are over, and the jobs of a round that would follow."""
        state = self.played()[-1].state
        return state, self.jobs(state, self.plan.rounds)

    def states(self) -> Iterator[tuple[int, Any]]:
        """Every round to come and the state before it: a client asked for it here does it again in the loop."""
        yield 0, self.strategy.init(self.world.start)
        for done in fit(self.strategy, self.fleet, self.world.start, self.plan):
            yield done.number, done.state

    def jobs(self, state: Any, t: int) -> dict[int, Job]:
        """The jobs of all clients for round t, as they are sent."""
        clients = self.fleet.clients()
        return {c.id: select_rows(job_for(self.strategy, state, c, self.plan, t)) for c in clients}

    def worn(self, i: int, job: Job) -> LoRA:
        """Have client i wear the model that it would use; its adapter."""
        self.fleet.evaluate({i: job})
        return self.world.model.get_adapter()

    def trained(self, i: int, job: Job) -> tuple[Update, LoRA]:
        """Have client i do the job; its message, and its adapter as training left it."""
        update = dict(self.fleet.train({i: job}))[i]
        assert isinstance(update, Update), f"{self.strategy}: client {i} failed in round {job.round}: {update.reason}"
        return update, self.world.model.get_adapter()


@contextmanager
def lab(
    strategy: Strategy[Any], where: SmallModel, fleets: Fleets = Serial, ranks: Sequence[int] = ALIKE, plan: Plan = PLAN
) -> Iterator[Lab]:
    """A fleet of as many clients as there are ranks, on a disk that goes afterwards."""
    with TemporaryDirectory() as folder:
        yield Lab(strategy, where, fleets(where.model, where.clients_data[: len(ranks)], ranks, Path(folder)), plan)


def model_of(job: Job, start: LoRA, now: LoRA) -> Side:
    """All that a client with this adapter now, which started the job with that one, adds to the pretrained weights."""
    under = (*job.offset, scale(start.only("ABR"), -1)) if job.resumes else job.offset
    return added(job, now, under)
