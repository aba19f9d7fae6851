"""Clients without a model: they treat a job as a real client does, and where that would train they move at random."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from fedlora.jobs import kept_part, shared_part, start_with
from fedlora.lora import LoRA, Side, delta, join, scale
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.strategy import Client, Job, Sender, Strategy, next_state

from .verdict import identical

Shapes = Mapping[str, tuple[int, int]]
ANY: Shapes = {"query": (48, 48), "value": (20, 48), "up": (56, 36), "down": (36, 56)}  # module -> (d_out, d_in)
TIGHT: Shapes = {"query": (4, 4), "value": (4, 7), "out": (7, 4)}  # a dimension of each is the rank
RANK = 4


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of this shape that depend on the name alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:8]) >> 1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def fresh(shapes: Shapes = ANY, rank: int = RANK, dtype: torch.dtype = torch.float64) -> LoRA:
    """An adapter as PEFT makes it, A random and B zero, with a head."""
    return LoRA(
        A={m: draw(f"A {m}", rank, d_in, dtype=dtype) / d_in**0.5 for m, (_, d_in) in shapes.items()},
        B={m: torch.zeros(d_out, rank, dtype=dtype) for m, (d_out, _) in shapes.items()},
        H={"head.weight": draw("head.weight", 3, 8, dtype=dtype), "head.bias": draw("head.bias", 3, dtype=dtype)},
    )


@dataclass(frozen=True, eq=False)
class Work:
    """One client's round: its job, and the result."""

    job: Job
    update: LoRA  # as `aggregate` gets it
    trained: LoRA  # the factors at the end of training
    model: Side  # everything that the client's model adds to the pretrained weights, (d_out, d_in)
    sender: Sender  # what the server is told beside the update
    client: Client


def as_they_are(updates: Sequence[LoRA], weights: Sequence[float]) -> tuple[Sequence[LoRA], Sequence[float]]:
    """The updates and their weights, as a server has them that gets every one."""
    return updates, weights


def aggregated(
    strategy: Strategy[Any],
    state: Any,
    work: Sequence[Work],
    weights: Sequence[float],
    seen: Callable[[Sequence[LoRA], Sequence[float]], tuple[Sequence[LoRA], Sequence[float]]] = as_they_are,
) -> Any:
    """The state that the strategy makes of a round's work, in as many passes as it declares.

    It is told the senders if it declares so; `seen` makes of each pass's updates and weights those that it gets.
    """
    updates, senders = [w.update for w in work], [w.sender for w in work]
    for further in range(strategy.exchanges):
        if further:
            updates = [shared_part(strategy.client_init(state, w.client), w.trained) for w in work]
        state = next_state(strategy, state, *seen(updates, weights), senders)
    return state


@dataclass
class Clients:
    """A few clients of one strategy, and the sides that each keeps from round to round."""

    strategy: Strategy[Any]
    ranks: Sequence[int] = (RANK, RANK, RANK)
    kept: dict[int, LoRA] = field(default_factory=dict)

    @property
    def weights(self) -> list[float]:
        """A weight for each client. Divided by their sum they are no binary fractions: no mean is exact by luck."""
        return [5.0, 7.0, 13.0, 6.0][: len(self.ranks)]

    def job(self, state: Any, i: int) -> Job:
        """The job of client i."""
        return self.strategy.client_init(state, self.client(i))

    def client(self, i: int) -> Client:
        """What the server knows of client i."""
        return Client(i, i + 1, self.ranks[i])

    def work(self, state: Any, t: int, who: Collection[int] | None = None) -> list[Work]:
        """Round t of these clients, or of all."""
        chosen = range(len(self.ranks)) if who is None else sorted(who)
        return [self._work(state, t, i) for i in chosen]

    def _work(self, state: Any, t: int, i: int) -> Work:
        told = {"accuracy": i / (t + i + 1)}
        sender = Sender(i, i + 1, loss=1 / (t + i + 1), metrics=told, sum_of_rates=0.1 * (i + 1))
        job, kept = self.job(state, i), self.kept.get(i, LoRA())
        work, kept = train(job, kept, sender, self.client(i), f"client {i} round {t}")
        if kept:
            self.kept[i] = kept
        return work

    def jobs(self, state: Any) -> list[Job]:
        """The job of every client."""
        return [self.job(state, i) for i in range(len(self.ranks))]

    def start(self, state: Any, i: int) -> LoRA:
        """The factors with which client i would start its next job."""
        return start_and_offset(self.job(state, i), self.kept.get(i, LoRA()))[0]

    def model(self, state: Any, i: int) -> Side:
        """What client i would add to the pretrained weights at the start of its next job, (d_out, d_in)."""
        job = self.job(state, i)
        return added(job, *start_and_offset(job, self.kept.get(i, LoRA())))


def start_apart(strategy: Strategy[Any], jobs: Sequence[Job]) -> bool:
    """Do these clients start from models of their own, as those of a strategy may that is told who sent what?"""
    return strategy.needs_senders and not all(identical(job.start, jobs[0].start) for job in jobs)


def start_and_offset(job: Job, kept: LoRA) -> tuple[LoRA, tuple[LoRA, ...]]:
    """The factors with which a client starts the job, and the offset under them."""
    sent = select_rows(job)
    start = start_with(sent, kept)
    return start, offset_under(sent, start)


def offset_under(job: Job, start: LoRA) -> tuple[LoRA, ...]:
    """The job's offset; where the job resumes, less the product of the factors that the client starts with."""
    return (*job.offset, scale(start.only("ABR"), -1)) if job.resumes else job.offset


def added(job: Job, lora: LoRA, offset: tuple[LoRA, ...]) -> Side:
    """Everything that a client adds to the pretrained weights, with the gain of the job's sketch: (d_out, d_in)."""
    gain = select_rows(job).gain
    own = delta(LoRA(lora.A, {m: gain.get(m, 1.0) * b for m, b in lora.B.items()}, R=lora.R))
    under = delta(join(*offset))
    return {m: product + under.get(m, torch.zeros(())) for m, product in own.items()}


def train(job: Job, kept: LoRA, sender: Sender, client: Client, seed: str) -> tuple[Work, LoRA]:
    """One client's round: the result, and the sides that stay with the client."""
    start, offset = start_and_offset(job, kept)
    trained = moved(start, job.trains, seed)
    shared = shared_part(job, trained)
    if job.resumes:  # the change of the product, at twice the rank
        shared = join(trained, scale(start.only("ABR"), -1)).over(shared.only("H"))
    work = Work(job, scatter_rows(job, shared), trained, added(job, trained, offset), sender, client)
    return work, kept_part(job, trained)


def moved(lora: LoRA, sides: str, seed: str) -> LoRA:
    """The adapter with these sides moved at random."""

    def move(s: str) -> Side:
        return {m: t + draw(f"{seed} {s} {m}", *t.shape, dtype=t.dtype) for m, t in lora.side(s).items()}

    return LoRA(**{s: move(s) for s in sides}).over(lora)


def mean(models: Sequence[Side], weights: Sequence[float]) -> Side:
    """The weighted mean of several models, module by module."""
    total = sum(weights)
    return {m: reduce(torch.add, [w / total * x[m] for w, x in zip(weights, models, strict=True)]) for m in models[0]}
