"""The round loop, and the one seam between an algorithm and where clients run."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from .errors import RoundFailed, StrategyError
from .exactness import distance
from .flat import Traffic
from .gather import Answers, Failure, Sum, gather
from .lora import LoRA
from .metrics import Metrics, spread
from .sketch import narrow
from .strategy import Client, Job, Strategy, Training, Update

__all__ = ["Answers", "Failure", "Fleet", "Past", "Plan", "Policy", "Round", "Sum", "fit"]
log = logging.getLogger("fedlora")


class Fleet(Protocol):
    """Somewhere clients run: this process, Flower's simulation, or machines elsewhere."""

    traffic: Traffic

    def clients(self) -> Sequence[Client]:
        """The clients that may be asked, known by their ids."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job, handing over each answer as it comes; a client that failed has a `Failure`, or is missing."""

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The model of every job, with what its client keeps, on that client's held-out examples."""


@dataclass(frozen=True)
class Policy:
    """How the server runs its rounds."""

    weights: Annotated[Literal["examples", "uniform"], "a client's weight in the mean"] = "examples"
    quorum: Annotated[float, Gt(0), Le(1), "share of a round's clients that must answer"] = 0.5
    below_quorum: Annotated[Literal["stop", "skip"], "end the run, or go on with the model as it was"] = "stop"
    deadline: Annotated[float, Ge(0), "seconds after which a client has failed its round (flower); 0: never"] = 0.0
    eval_every: Annotated[int, Ge(0), "rounds between evaluations; the last is always evaluated; 0: only that"] = 1
    patience: Annotated[int, Ge(0), "evaluations without a lower loss before the run stops early; 0: never"] = 0


@dataclass(frozen=True, eq=False)
class Past:
    """Where a resumed run takes up."""

    rounds: int  # finished
    state: Any
    losses: tuple[float, ...] = ()  # of the global model, one an evaluation


@dataclass(frozen=True, eq=False)
class Round:
    """What came of a round."""

    number: int  # from 1
    state: Any
    asked: tuple[int, ...]
    failed: Mapping[int, str]  # client -> reason
    train_loss: float | None  # mean over clients by weight; none where the round was skipped
    eval: Mapping[str, float] | None  # of the global model
    eval_clients: Mapping[str, float | int | str] | None  # of each client's model on its own held-out examples
    bytes_up: int
    bytes_down: int
    seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)  # the strategy's own figures
    exactness: float | None = None  # relative distance from the mean of the clients' models; none: not measured

    def record(self) -> dict[str, Any]:
        """The round's line in `rounds.jsonl`."""
        return {
            "round": self.number,
            "clients": len(self.asked),
            "answered": len(self.asked) - len(self.failed),
            "failed": {str(i): why for i, why in self.failed.items()},
            "train_loss": self.train_loss,
            "eval": self.eval,
            "eval_clients": self.eval_clients,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": round(self.seconds, 3),
            **({"notes": dict(self.notes)} if self.notes else {}),
            **({"exactness": self.exactness} if self.exactness is not None else {}),
        }


@dataclass(frozen=True)
class Plan:
    """What `fit` is to do, whatever the strategy and the fleet."""

    rounds: int
    cohort: int  # clients asked in a round
    seed: int = 0
    training: Training = field(default_factory=Training)
    policy: Policy = field(default_factory=Policy)
    evaluate: Callable[[LoRA], Metrics] | None = None  # the global model on the global held-out set
    evaluate_clients: bool = False
    exactness: Mapping[str, float] | None = None  # module -> s, to measure it; all of a round's updates are then held


def fit(strategy: Strategy[Any], fleet: Fleet, lora: LoRA, plan: Plan, past: Past | None = None) -> Iterator[Round]:
    """Run the rounds that are left, yielding after each; raises `RoundFailed` when too few clients answer."""
    state, first = (past.state, past.rounds) if past else (strategy.init(lora), 0)
    losses = list(past.losses) if past else []
    answered = first > 0
    for t in range(first, plan.rounds):
        if stalled(losses, plan.policy.patience):
            return
        began, up, down = time.monotonic(), fleet.traffic.up, fleet.traffic.down
        cohort = sample(fleet.clients(), plan.cohort, plan.seed, t)
        jobs = {c.id: _job(strategy, state, c, plan, t) for c in cohort}
        answers = fleet.train({i: narrow(job) for i, job in jobs.items()})
        got = gather(jobs, answers, _weigh(plan.policy), strategy.sums_only, plan.exactness is not None)
        enough = got.answered >= max(1, plan.policy.quorum * len(cohort))
        if not enough and plan.policy.below_quorum == "stop":
            raise RoundFailed(_too_few(t, got.answered, got.failed, plan))
        exactness = None
        if enough:
            answered = True
            state = strategy.aggregate(state, got.updates, got.weights)
            adapter = check(strategy, state, lora, t)
            exactness = distance(adapter, jobs, got.each, plan.exactness) if plan.exactness else None
        values, clients = _evaluate(strategy, state, fleet, plan, t)
        if values:
            losses.append(values["loss"])
        spent = fleet.traffic.up - up, fleet.traffic.down - down, time.monotonic() - began
        loss = got.loss if enough else None
        notes = strategy.notes(state)
        yield Round(t + 1, state, tuple(jobs), got.failed, loss, values, clients, *spent, notes, exactness)
    if not answered:
        raise RoundFailed(f"no client answered in any of {plan.rounds} rounds; see the reasons above")


def sample(clients: Sequence[Client], cohort: int, seed: int, t: int) -> list[Client]:
    """The clients of round t, drawn without replacement by (seed, round) alone, in the order of their ids."""
    ordered = sorted(clients, key=lambda c: c.id)
    chosen = Random(f"{seed}/cohort/{t}").sample(ordered, min(cohort, len(ordered)))
    return sorted(chosen, key=lambda c: c.id)


def split(jobs: Mapping[int, Job], answers: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, str]]:
    """The answers that are one, in the order of the jobs, and the reasons for the others."""
    good = {i: answers[i] for i in jobs if i in answers and not isinstance(answers[i], Failure)}
    bad = {i: getattr(answers.get(i), "reason", "no answer") for i in jobs if i not in good}
    for i, reason in bad.items():
        log.warning("client %d failed: %s", i, reason)
    return good, bad


def stalled(losses: Sequence[float], patience: int) -> bool:
    """Have the last `patience` evaluations all failed to go below the best before them?"""
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def check(strategy: Strategy[Any], state: Any, like: LoRA, t: int) -> LoRA:
    """The adapter of a state; refused where no client could load it, naming the matrix."""
    name, adapter = type(strategy).__name__, strategy.adapter(state)
    for m in like.A:
        a, b = adapter.A.get(m), adapter.B.get(m)
        if a is None or b is None:
            raise StrategyError(f"round {t + 1}: strategy {name} returned no {'A' if a is None else 'B'} for {m}")
        if not _fits(a, b, like.A[m], like.B[m]):
            d_in, d_out = like.A[m].shape[-1], like.B[m].shape[0]
            want = f"A (r, {d_in}) and B ({d_out}, r)" if a.dim() > 1 else f"A ({d_in},) and B ({d_out},)"
            raise StrategyError(
                f"round {t + 1}: strategy {name} returned A {tuple(a.shape)} and B {tuple(b.shape)} for {m}; "
                f"it takes {want}"
            )
    for m, h in like.H.items():
        got = adapter.H.get(m)
        if got is None or got.shape != h.shape:
            there = "nothing" if got is None else tuple(got.shape)
            raise StrategyError(f"round {t + 1}: strategy {name} returned {there} for {m}; it takes {tuple(h.shape)}")
    for side in (adapter.A, adapter.B, adapter.H):
        for m, x in side.items():
            if not bool(torch.isfinite(x).all()):
                raise StrategyError(f"round {t + 1}: the new adapter is not finite at {m}; a lower train.lr may help")
    return adapter


def _fits(a: Tensor, b: Tensor, like_a: Tensor, like_b: Tensor) -> bool:
    """Are these two factors of one rank, or two vectors (VeRA), for a module of this shape?"""
    if like_a.dim() == 1:
        return a.shape == like_a.shape and b.shape == like_b.shape
    return a.dim() == b.dim() == 2 and (b.shape[0], a.shape[1], a.shape[0]) == (
        like_b.shape[0],
        like_a.shape[1],
        b.shape[1],
    )


def _weigh(policy: Policy) -> Callable[[Update], float]:
    return (lambda update: float(update.examples)) if policy.weights == "examples" else (lambda _: 1.0)


def _job(strategy: Strategy[Any], state: Any, client: Client, plan: Plan, t: int) -> Job:
    job = strategy.client_init(state, client)
    return replace(job, training=plan.training, seed=plan.seed, round=t, rounds=plan.rounds)


def _evaluate(
    strategy: Strategy[Any], state: Any, fleet: Fleet, plan: Plan, t: int
) -> tuple[dict[str, float] | None, dict[str, float | int | str] | None]:
    every = plan.policy.eval_every
    if not (t + 1 == plan.rounds or (every and (t + 1) % every == 0)):
        return None, None
    values = plan.evaluate(strategy.adapter(state)).values() if plan.evaluate else None
    if not plan.evaluate_clients:
        return values, None
    jobs = {c.id: _job(strategy, state, c, plan, t) for c in fleet.clients()}
    return values, spread(split(jobs, fleet.evaluate(jobs))[0])


def _too_few(t: int, answered: int, failed: Mapping[int, str], plan: Plan) -> str:
    asked = answered + len(failed)
    why = "; ".join(f"client {i}: {reason}" for i, reason in list(failed.items())[:3])
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return (
        f"round {t + 1}: {answered} of {asked} clients answered, "
        f"server.quorum = {plan.policy.quorum:g} needs more ({why}{more})"
    )
