"""What a run will send, take and spend, in figures and in words."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedlora.config import Config
from fedlora.jobs import sent_sides
from fedlora.log_lines import counted
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import RunSetup, prepare
from fedlora.strategy import title

from . import memory, remedies, room
from .live_bytes import LiveBytes
from .memory import Memory, StepMemory
from .played import PlayedRounds, play, varies
from .probes import Probes
from .remedies import Needs
from .room import words


@dataclass(frozen=True)
class Traffic:
    """Bytes of adapters, as rounds.jsonl counts them."""

    up: int  # that a client sends in a round: the mean over clients and rounds
    down: int  # that a client is sent in a round
    most_down: int  # that a client is sent in the round in which it is sent most
    run_up: int  # of all clients, in all rounds
    run_down: int
    rounds_up: tuple[int, ...]  # of all clients, in each round that was played
    rounds_down: tuple[int, ...]
    played: int  # rounds; the others go on as these did
    varies: bool  # do they depend on what clients learn? Then these are the most


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine, from a few steps on it."""

    per_example: float  # of training
    client: float  # of a client's training in a round, by itself: that with most to do
    round: float  # of a simulated round, its evaluation among it
    run: float  # of all rounds of a simulation


@dataclass(frozen=True)
class Estimate:
    """All that is known of a run before it starts."""

    strategy: str
    clients: int
    cohort: int
    rounds: int
    engine: str
    device: str
    base_numbers: int
    base_bytes: int
    trained_numbers: int  # by a client in a round
    sent_numbers: int  # by a client in a round
    traffic: Traffic
    memory: Memory
    room: int  # bytes of memory that there are
    pace: Pace
    disk_run: int  # bytes of the run directory
    disk_client: int  # that a client keeps
    privacy: tuple[str, ...]  # the run's own words

    def record(self) -> dict[str, Any]:
        """All of it by name."""
        m = self.memory
        peaks = {"client": m.client, "server": m.server, "simulation": m.simulation}
        return asdict(self) | {"peaks": peaks}

    def lines(self) -> Iterator[str]:
        """Yield all of it for people, a line each."""
        yield (
            f"{self.strategy}, {counted(self.clients, 'client')}, {self.cohort} a round, "
            f"{counted(self.rounds, 'round')}; engine {self.engine} on {self.device}"
        )
        share = self.trained_numbers / max(self.base_numbers, 1)
        yield (
            f"parameters: a client trains {self.trained_numbers:,} numbers, {share:.2%} of the base's "
            f"{self.base_numbers:,}, and sends {self.sent_numbers:,}"
        )
        yield from self._traffic_lines()
        yield from self._memory_lines()
        yield self._pace_line()
        yield (
            f"disk: {words(self.disk_run)} in the run directory; a client keeps {words(self.disk_client)} between "
            "rounds, besides its model and data"
        )
        yield from self.privacy or ("privacy: none; --dp-epsilon 8 would hide each record of a client",)

    def _traffic_lines(self) -> Iterator[str]:
        t = self.traffic
        most = "at most " if t.varies else ""
        yield (
            f"bytes: a client sends {most}{words(t.up)} and is sent {most}{words(t.down)} a round, "
            f"{words(t.most_down)} in the round with most"
        )
        went_on = "" if t.played == self.rounds else f", of which {t.played} were played and the others go on as these"
        yield f"bytes: {words(t.run_up)} up and {words(t.run_down)} down in {counted(self.rounds, 'round')}{went_on}"

    def _memory_lines(self) -> Iterator[str]:
        m = self.memory
        yield (
            f"memory: a simulation takes {words(m.simulation)} at most, a client on its own machine {words(m.client)}, "
            f"a server {words(m.server)}, besides Flower's processes; there are {words(self.room)}"
        )
        begun = "tensors of the model" if self.device != "cpu" else "the process with model and data"
        again = f"; {words(m.checked)} at the end, for the check of what was written" if m.checked else ""
        yield (
            f"memory: {words(m.begins)} are {begun} (the base {words(m.base)}), {words(m.step)} a training step, "
            f"{words(m.evaluating)} an evaluation, {words(m.serving)} the server's work{again}"
        )

    def _pace_line(self) -> str:
        p = self.pace
        return (
            f"time: {seconds(p.client)} of training a round for the client with most to do; a simulated round "
            f"{seconds(p.round)}, all {seconds(p.run)}, as a few steps went on this machine just now"
        )


def seconds(x: float) -> str:
    """Seconds for people: `0.4 s`, `52 s`, `14 min`, `3.2 h`."""
    if x < 120:
        return f"{x:.2g} s" if x < 10 else f"{x:.0f} s"
    return f"{x / 60:.0f} min" if x < 7200 else f"{x / 3600:.1f} h"


def estimate(config: Config, *, examples: int = 0, most: int = 0) -> Estimate:
    """The estimate of a run by these settings, on this machine.

    `examples` is how many training rows each client has, where the data are not theirs; `most` is the memory in bytes
    of the machine that is planned for, by default what is free here. Raises `MemoryShort` for a run that does not fit,
    and whatever the run would raise.
    """
    remedies.refuse_large_base(config, most or room.free(torch.device("cpu")))
    setup = prepare(config)
    setup.preview.record()
    with TemporaryDirectory(prefix="fedlora-plan-") as place:
        return _estimate(setup, RunDirectory(Path(place)), examples=examples, most=most)


def _estimate(setup: RunSetup, folder: RunDirectory, *, examples: int, most: int) -> Estimate:
    live = LiveBytes()
    played = play(setup, folder, live, examples=examples)
    probes = Probes(setup, played, folder.clients)
    there = most or room.free(setup.model.device)
    found = _memory(probes, live, there)
    model, config = setup.model, setup.config
    job = probes.job(probes.clients[0])
    disk = played.disk
    return Estimate(
        strategy=title(played.strategy),
        clients=config.clients,
        cohort=config.cohort,
        rounds=config.rounds,
        engine=config.engine,
        device=str(model.device),
        base_numbers=model.size,
        base_bytes=found.base,
        trained_numbers=job.start.only(job.trains).numel(),
        sent_numbers=job.start.only(sent_sides(job)).numel(),
        traffic=_traffic(played, varies=varies(setup, played, examples=examples)),
        memory=found,
        room=there,
        pace=_pace(probes),
        disk_run=disk.run,
        disk_client=disk.client,
        privacy=played.privacy,
    )


def _memory(probes: Probes, live: LiveBytes, there: int) -> Memory:
    """What the run takes. Raises `MemoryShort`, before a whole step is done, where small ones say it does not fit."""
    played, model = probes.played, probes.setup.model
    base, times = memory.base_bytes(model), memory.allowance(model)
    first = {True, not probes.stacks}  # is a client trained by itself?
    with live:
        for alone in first:  # what the first step makes for all later ones is no part of a step
            probes.train(rows=1, alone=alone)
        begins = memory.begins_with(model)
        steps = {alone: memory.small_steps(probes, live, alone=alone) for alone in first}
        engine, rows, clients = steps[not probes.stacks], probes.rows, 1
        if probes.stacks:
            rows, clients = probes.rows_at_once, probes.together
        needs = Needs(
            begins=begins,
            base=base,
            rows=rows,
            clients=clients,
            step=engine,
            serving=played.served - played.held,
            allowance=times,
        )
        remedies.refuse_what_does_not_fit(needs, probes.setup.config, there)
        by_itself = probes.peak(live, rows=probes.rows, alone=True)
        step = _pass(probes, live, engine) if probes.stacks else by_itself
        evaluating = probes.evaluation_peak(live)
    return Memory(
        begins=begins,
        base=base,
        held=played.held,
        serving=played.served - played.held,
        evaluating=int(times * evaluating),
        alone=int(times * by_itself),
        step=int(times * step),
        checked=memory.room_for_a_second_base(base, there, begins),
    )


def _pass(probes: Probes, live: LiveBytes, small: StepMemory) -> int:
    """The bytes of a step of all clients that train together: of one micro-batch, and of those on other threads."""
    more = (probes.rows_at_once - probes.stacked_rows) * small.per_row + (probes.together - 1) * small.per_client
    return probes.peak(live, rows=probes.stacked_rows) + more


def _traffic(played: PlayedRounds, *, varies: bool) -> Traffic:
    run_up, run_down = played.of_run(played.up), played.of_run(played.down)
    answers = max(1, round(fmean(played.answered) * played.plan.rounds))
    each = [down / max(1, n) for down, n in zip(played.down, played.answered, strict=True)]
    return Traffic(
        up=run_up // answers,
        down=run_down // answers,
        most_down=round(max(each)),
        run_up=run_up,
        run_down=run_down,
        rounds_up=played.up,
        rounds_down=played.down,
        played=len(played.up),
        varies=varies,
    )


def _pace(probes: Probes) -> Pace:
    setup, plan = probes.setup, probes.played.plan
    per_example = probes.seconds_per_example()
    work = [probes.work(client) for client in probes.clients]
    evaluated = len(setup.evaluation) if len(setup.evaluation_rows) else 0
    own = sum(len(data.heldout_rows) for data in setup.clients_data) if plan.evaluate_clients else 0
    measured = (evaluated + own) * probes.seconds_per_evaluated() if evaluated + own else 0.0
    every = plan.policy.eval_every
    per_round = per_example * fmean(work) * plan.cohort + probes.played.seconds
    evaluations = 1 + (plan.rounds // every if every else 1)
    return Pace(
        per_example=per_example,
        client=per_example * max(work),
        round=per_round + (measured if every == 1 else 0.0),
        run=per_round * plan.rounds + measured * evaluations,
    )
