"""The rounds of a run, played without training: the bytes of each, the state that they come to, what the server takes.

The round loop, the strategy and the messages are those of a run, so that bytes are counted and not calculated.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, linear_regression
from tempfile import TemporaryDirectory
from typing import Any

from fedlora.jobs import Client
from fedlora.lora import LoRA
from fedlora.models.peft_files import save_peft
from fedlora.run.compose import compose
from fedlora.run.directory import RunDirectory
from fedlora.run.plan import Plan
from fedlora.run.privacy_statement import summary_lines
from fedlora.run.setup import RunSetup
from fedlora.server.run import ledgers_of, plan_of, privacy_of, rounds_left
from fedlora.simulations.fleets import on_clock
from fedlora.simulations.local_clients import charges_in_ledgers
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.strategy import Strategy

from .live_bytes import LiveBytes
from .untrained import UntrainedFleet, along_one_direction

LONGEST = 20.0  # seconds after which no further round is played
FEW = 3  # rounds that are played a second time


@dataclass(frozen=True)
class Disk:
    """Bytes that a run leaves on disks, at its end."""

    run: int  # the run directory, on the server or in a simulation, but for what simulated clients keep
    client: int  # what the client that keeps most has, besides the base model


@dataclass(frozen=True, eq=False)
class PlayedRounds:
    """What came of the rounds that were played."""

    strategy: Strategy[Any]
    plan: Plan  # without evaluations of the global model
    clients: tuple[Client, ...]  # all there are
    state: Any  # after the last round that was played
    up: tuple[int, ...]  # bytes that all clients of a round sent
    down: tuple[int, ...]  # and were sent
    answered: tuple[int, ...]  # clients, of each round
    seconds: float  # of a round, without any training
    served: int  # most bytes of tensors that were alive at once, with all that the server does
    held: int  # bytes of those that are alive between rounds
    disk: Disk
    privacy: tuple[str, ...]  # the run's own words about its privacy

    def of_run(self, played: Sequence[int]) -> int:
        """Bytes of all rounds: of those that were played, and of the others as these went on to the last."""
        rest = range(len(played) + 1, self.plan.rounds + 1)
        return sum(played) + sum(_going_on(played, t) for t in rest)


def _going_on(played: Sequence[int], t: int) -> int:
    """Bytes of round t after the last that was played, along the line of the later half of these."""
    late = range(len(played) // 2, len(played))
    if len(late) < 2:
        return played[-1]
    slope, base = linear_regression([i + 1 for i in late], [played[i] for i in late])
    return max(0, round(slope * t + base))


def play(setup: RunSetup, folder: RunDirectory, live: LiveBytes, *, examples: int = 0) -> PlayedRounds:
    """Play the run's rounds, as many as there is time for; clients keep theirs in `folder`, an empty one.

    `examples` is how many each client has, if not as many as its data have. Raises what the run would raise of
    settings that cannot be run.
    """
    strategy = compose(setup.config, setup.start, setup.ranks)
    untrained = UntrainedFleet(setup, folder.clients, examples=examples)
    fleet = on_clock(setup.config, untrained)
    plan = plan_of(setup, fleet)
    state = strategy.init(setup.start)
    charged = charges_in_ledgers(setup.config, setup.clients_data, folder.clients)
    statement = privacy_of(setup, plan, strategy, state, fleet, ledgers_of(plan, fleet.clients(), charged, {}))
    quick = replace(plan, evaluate=None, generate=None, exactness=None, policy=replace(plan.policy, patience=0))
    began, records = time.monotonic(), []
    with live:
        for done in rounds_left(setup, strategy, fleet, quick, None):
            state, record = done.state, done.record()
            records.append(record)
            kept = Checkpoint(done.number, state, record, done.scores, records[:-1], done.in_flight)
            if done.number == quick.rounds or time.monotonic() - began > LONGEST:
                checkpoint.save(folder.checkpoints, kept)
                break
    return PlayedRounds(
        strategy=strategy,
        plan=quick,
        clients=tuple(fleet.clients()),
        state=state,
        up=tuple(record["bytes_up"] for record in records),
        down=tuple(record["bytes_down"] for record in records),
        answered=tuple(record["answered"] for record in records),
        seconds=fmean(record["seconds"] for record in records),
        served=live.peak,
        held=live.now,
        disk=_disk(setup, folder, strategy.adapter(state)),
        privacy=tuple(summary_lines(statement)) if statement else (),
    )


def varies(setup: RunSetup, played: PlayedRounds, *, examples: int = 0) -> bool:
    """Would the first rounds take other bytes, had their clients learned along one direction alone?"""
    with TemporaryDirectory(prefix="fedlora-plan-") as place:
        fleet = UntrainedFleet(setup, Path(place), examples=examples, move=along_one_direction)
        rounds = rounds_left(setup, played.strategy, on_clock(setup.config, fleet), played.plan, None)
        found = [(done.bytes_up, done.bytes_down) for done in islice(rounds, FEW)]
    return found != [*zip(played.up, played.down, strict=True)][: len(found)]


def _disk(setup: RunSetup, folder: RunDirectory, adapter: LoRA) -> Disk:
    """What lies on disks, with the adapter that is delivered; the last two checkpoints are kept."""
    save_peft(setup.model, adapter, folder.adapter)
    clients = [_size(path) for path in folder.clients.glob("*")]
    checkpoints = _size(folder.checkpoints) - sum(clients)
    return Disk(run=2 * checkpoints + _size(folder.adapter), client=max(clients, default=0))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
