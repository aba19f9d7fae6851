"""One training step of the run's own engine on a few examples, to see what it takes; nothing of it is sent or kept."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from fedlora.client import training
from fedlora.client.stacked import support, together
from fedlora.client.training import TrainingTask
from fedlora.encoding.encoder import Example
from fedlora.errors import ConfigError
from fedlora.jobs import Client, Job
from fedlora.kernels import threads
from fedlora.kernels.evaluation import measure
from fedlora.kernels.example_batches import tokens
from fedlora.kernels.microbatches import bounds
from fedlora.messages.sketch import select_rows
from fedlora.run.plan import job_for
from fedlora.run.setup import RunSetup
from fedlora.simulations.clock import work
from fedlora.simulations.stacked import MOST_CLIENTS
from fedlora.storage.client_state import ClientState

from .live_bytes import LiveBytes
from .played import PlayedRounds

LOOKED_AT = 40  # examples of a client, and clients, among which the longest is looked for
ENOUGH = 2.0  # seconds of training after which its pace is known
MOST_TIMED = 64  # examples in a step that is timed


@dataclass(frozen=True, eq=False)
class Probes:
    """Steps of a run's training, by the jobs of the round after those that were played."""

    setup: RunSetup
    played: PlayedRounds
    folder: Path  # in which clients keep what is theirs

    def __post_init__(self) -> None:
        if not self.examples:  # encoded now, and not while tensors are counted
            raise ConfigError("no client has an example to try a step on; give --data with rows as the clients have")

    @cached_property
    def examples(self) -> list[Example]:
        """Examples of the clients, the longest first."""
        some = islice(self.setup.clients_data, LOOKED_AT)
        found = [*chain.from_iterable(islice(iter(data.train), LOOKED_AT) for data in some)]
        return sorted(found, key=tokens, reverse=True)

    @property
    def stacks(self) -> bool:
        """Are several clients of this run trained in one pass?"""
        model, job = self.setup.model, self.job(self.clients[0])
        return self.setup.config.engine != "serial" and support.why_not(model, job) is None

    @property
    def rows(self) -> int:
        """The examples that one client by itself computes at once, in a batch of the longest."""
        job, most = self.job(self.clients[0]), max(client.examples for client in self.clients)
        return 1 if job.example_clip else min(job.training.batch_size, most)

    @property
    def stacked_rows(self) -> int:
        """The examples of a micro-batch of the longest, where clients train together."""
        return min(self.rows_at_once, max(1, bounds(self.setup.model.net).tokens // tokens(self.examples[0])))

    @property
    def rows_at_once(self) -> int:
        """The examples that are computed at once where clients train together, in a micro-batch on each thread."""
        step = self.played.plan.training.batch_size * self.played.plan.training.accumulate
        room = max(1, bounds(self.setup.model.net).tokens // tokens(self.examples[0]))
        return max(1, min(threads.at_once(self.setup.model, draws=True) * room, self.together * step))

    @property
    def together(self) -> int:
        """The clients that train in one pass."""
        most = together.MOST_BYTES // together.memory(self.job(self.clients[0]))
        return max(1, min(self.played.plan.cohort, most, MOST_CLIENTS))

    @property
    def clients(self) -> Sequence[Client]:
        """The clients that can train, the one with most examples first."""
        dp = self.played.plan.record_level
        able = [c for c in self.played.clients if c.examples and not (dp and dp.why_left_out(c))]
        return sorted(able, key=lambda client: -client.examples)

    def job(self, client: Client) -> Job:
        """The client's job in the round after those that were played, or in the last one."""
        plan, t = self.played.plan, min(len(self.played.up), self.played.plan.rounds - 1)
        return select_rows(job_for(self.played.strategy, self.played.state, client, plan, t))

    def train(self, *, clients: int = 1, rows: int, alone: bool = False) -> None:
        """Do one step of so many clients on `rows` of the longest examples each: together, or one by one."""
        self._perform([self._task(client, self._longest(rows)) for client in self.clients[:clients]], alone=alone)

    def peak(self, live: LiveBytes, *, clients: int = 1, rows: int, alone: bool = False) -> int:
        """The most bytes of tensors alive in such a step, above those that are alive before it."""
        live.begin_peak()
        before = live.now
        with threads.one_thread():  # tensors are counted where they are made
            self.train(clients=clients, rows=rows, alone=alone)
        return live.peak - before

    def evaluation_peak(self, live: LiveBytes) -> int:
        """The most bytes of tensors alive while the model is measured on micro-batches of the longest examples."""
        live.begin_peak()
        before = live.now
        with threads.one_thread():
            measure(
                self.setup.model, self._longest(max(1, bounds(self.setup.model.net).tokens // tokens(self.examples[0])))
            )
        return threads.at_once(self.setup.model) * (live.peak - before)

    def seconds_per_example(self) -> float:
        """What training takes for each example that it goes through, by one step or several of a few clients."""
        size = self.played.plan.training.batch_size * self.played.plan.training.accumulate
        few = self.clients[: max(1, min(self.together, MOST_TIMED // size))] if self.stacks else self.clients[:1]
        tasks = [self._task(client, self._typical(min(size, client.examples, MOST_TIMED))) for client in few]
        rows, seconds, times = sum(len(task.examples) for task in tasks), 0.0, 0
        while seconds < ENOUGH and times < 8:
            began = time.perf_counter()
            self._perform(tasks, alone=not self.stacks)
            seconds += time.perf_counter() - began
            times += 1
        return seconds / (times * rows)

    def seconds_per_evaluated(self) -> float:
        """What measuring the model takes for each held-out example."""
        some = self._typical(MOST_TIMED)
        began = time.perf_counter()
        measure(self.setup.model, some)
        return (time.perf_counter() - began) / len(some)

    def work(self, client: Client) -> float:
        """The examples that a client goes through in a round."""
        return work(self.job(client), client)

    def _perform(self, tasks: Sequence[TrainingTask], *, alone: bool) -> None:
        if alone:
            for task in tasks:
                training.perform(self.setup.model, task)
            return
        for _, outcome in together.perform(self.setup.model, tasks, lambda _: None):
            training.trained(outcome)

    def _task(self, client: Client, examples: Sequence[Example]) -> TrainingTask:
        """One step of the client's job, on these examples: a private one draws each of them."""
        job = self.job(client)
        rows = len(examples) if job.training.batch_size >= len(examples) else job.training.batch_size
        step = replace(job.training, steps=1, batch_size=rows, accumulate=-(-len(examples) // rows))
        terms = job.privacy and replace(job.privacy, rate=1.0, steps=1)
        kept = ClientState(self.folder / str(client.id)).before(job.round)
        return TrainingTask(
            client=client.id,
            job=replace(job, training=step, privacy=terms, masking=None),
            kept=kept,
            examples=examples,
            records=[[example] for example in examples],
        )

    def _longest(self, count: int) -> list[Example]:
        return [self.examples[i % len(self.examples)] for i in range(count)]

    def _typical(self, count: int) -> list[Example]:
        """So many of the examples, from the longest to the shortest."""
        n = len(self.examples)
        return [self.examples[(i * n // count) % n] for i in range(count)]
