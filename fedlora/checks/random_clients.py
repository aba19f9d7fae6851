"""Clients without a model: they do to a job what a worker does, and move at random where it would train."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from fedlora.lora import SIDES, LoRA, Side, delta, join, scale
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.strategy import Client, Job, Sender, Strategy, next_state

from .verdict import identical

Shapes = Mapping[str, tuple[int, int]]
ANY: Shapes = {"query": (48, 48), "value": (20, 48), "up": (56, 36), "down": (36, 56)}  # module -> (d_out, d_in)
TIGHT: Shapes = {"query": (4, 4), "value": (4, 7), "out": (7, 4)}  # a dimension of each is the rank
RANK = 4


def draw(what: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that hang on their name alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(what.encode()).digest()[:8]) >> 1)
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
    """What one client made of one job."""

    job: Job
    update: LoRA  # as `aggregate` gets it
    trained: LoRA  # the factors it ended with
    model: Side  # all that its model adds to the pretrained weights, (d_out, d_in)
    sender: Sender = Sender(0, 1)  # noqa: RUF009  # what the server is told beside the update


def aggregated(strategy: Strategy[Any], state: Any, work: Sequence[Work], weights: Sequence[float]) -> Any:
    """The state that the strategy makes of this work; of its senders it is told if it declares so."""
    return next_state(strategy, state, [w.update for w in work], weights, [w.sender for w in work])


@dataclass
class Clients:
    """Some clients of one strategy, with what they keep from round to round."""

    strategy: Strategy[Any]
    ranks: Sequence[int] = (RANK, RANK, RANK)
    kept: dict[int, LoRA] = field(default_factory=dict)

    @property
    def weights(self) -> list[float]:
        """None alike; divided by their sum they are no binary fractions, so that no mean is exact by luck."""
        return [5.0, 7.0, 13.0, 6.0][: len(self.ranks)]

    def job(self, state: Any, i: int) -> Job:
        """The job of client i."""
        return self.strategy.client_init(state, Client(i, i + 1, self.ranks[i]))

    def work(self, state: Any, t: int, who: Collection[int] | None = None) -> list[Work]:
        """Let these clients, or all, do round t."""
        done = {}
        for i in sorted(who if who is not None else range(len(self.ranks))):
            work, kept = do(self.job(state, i), self.kept.get(i, LoRA()), f"client {i} round {t}")
            done[i] = replace(
                work, sender=Sender(i, i + 1, loss=1 / (t + i + 1), metrics={"accuracy": i / (t + i + 1)})
            )
            if kept:
                self.kept[i] = kept
        return list(done.values())

    def jobs(self, state: Any) -> list[Job]:
        """The job of every client."""
        return [self.job(state, i) for i in range(len(self.ranks))]

    def model(self, state: Any, i: int) -> Side:
        """What client i would add to the pretrained weights at its next job's start, (d_out, d_in)."""
        job = self.job(state, i)
        return added(job, *wears(job, self.kept.get(i, LoRA())))


def start_apart(strategy: Strategy[Any], jobs: Sequence[Job]) -> bool:
    """Do these clients start from models of their own, as those of a strategy may that is told who sent what?"""
    return strategy.needs_senders and not all(identical(job.start, jobs[0].start) for job in jobs)


def private(job: Job) -> str:
    """The sides that a client trains for itself alone."""
    return "".join(s for s in SIDES if s in job.trains and s not in job.shares)


def keeps(job: Job) -> str:
    """The sides that stay with the client: those, and where it resumes its factors."""
    return "".join(s for s in SIDES if s in private(job) or (job.resumes and s in "AB"))


def wears(job: Job, kept: LoRA) -> tuple[LoRA, tuple[LoRA, ...]]:
    """The factors with which a client starts the job, and the offset it wears under them."""
    sent = select_rows(job)
    start = kept.only(keeps(job)).over(sent.start)
    return start, (*sent.offset, scale(start.only("ABR"), -1)) if job.resumes else sent.offset


def added(job: Job, lora: LoRA, offset: tuple[LoRA, ...]) -> Side:
    """All that a client adds to the pretrained weights, with the gain of its sketch: (d_out, d_in)."""
    gain = select_rows(job).gain
    own = delta(LoRA(lora.A, {m: gain.get(m, 1.0) * b for m, b in lora.B.items()}, R=lora.R))
    under = delta(join(*offset))
    return {m: own[m] + under[m] if m in under else own[m] for m in own}


def do(job: Job, kept: LoRA, seed: str) -> tuple[Work, LoRA]:
    """One client's round: what came of it, and what stays with the client."""
    start, offset = wears(job, kept)
    trained = moved(start, job.trains, seed)
    shared = trained.only(job.shares)
    if job.resumes:  # the change of the product, at twice the rank
        shared = join(trained, scale(start.only("ABR"), -1)).over(shared.only("H"))
    work = Work(job, scatter_rows(job, shared), trained, added(job, trained, offset))
    return work, trained.only(keeps(job))


def moved(lora: LoRA, sides: str, seed: str) -> LoRA:
    """The adapter with these sides moved at random."""

    def move(s: str) -> Side:
        return {m: t + draw(f"{seed} {s} {m}", *t.shape, dtype=t.dtype) for m, t in lora.side(s).items()}

    return LoRA(**{s: move(s) for s in sides}).over(lora)


def mean(models: Sequence[Side], weights: Sequence[float]) -> Side:
    """The weighted mean of some models, module by module."""
    total = sum(weights)
    return {m: reduce(torch.add, [w / total * x[m] for w, x in zip(weights, models, strict=True)]) for m in models[0]}
