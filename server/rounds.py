"""The round loop, and the one seam between an algorithm and where clients run."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.errors import Failure, RoundFailed, StrategyError
from fedlora.jobs import Ask, Client, Job, Spent, Update
from fedlora.lora import LoRA, map_factors
from fedlora.messages.parts import Traffic
from fedlora.messages.sketch import narrow
from fedlora.metrics import Metrics, spread
from fedlora.privacy.client_level import Clipping
from fedlora.run.plan import Past, Plan, Round
from fedlora.sections import Policy
from fedlora.server import secure_aggregation
from fedlora.server.aggregation import Answers, Gathered, Sum, gather
from fedlora.server.exactness import distance
from fedlora.strategy import Strategy

__all__ = ["Answers", "Failure", "Fleet", "Past", "Plan", "Policy", "Round", "Sum", "fit"]
log = logging.getLogger("fedlora")


class Fleet(Protocol):
    """Somewhere clients run: this process, Flower's simulation, or machines elsewhere."""

    traffic: Traffic

    def clients(self) -> Sequence[Client]:
        """The clients that may be asked, known by their ids."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job, handing over each answer as it comes; a client that failed has a `Failure`, or is missing."""

    def ask(self, asks: Mapping[int, Ask]) -> Mapping[int, Mapping[str, str] | Failure]:
        """A step of secure aggregation by each client, and what it says."""

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The model of every job, with what its client keeps, on that client's held-out examples."""


def fit(strategy: Strategy[Any], fleet: Fleet, lora: LoRA, plan: Plan, past: Past | None = None) -> Iterator[Round]:
    """Run the rounds that are left, yielding after each; raises `RoundFailed` when too few clients answer."""
    past = past or Past(0, strategy.init(lora))
    state, losses, spent = past.state, list(past.losses), dict(past.spent)
    clip, charges = past.clip or (plan.central.clip if plan.central else 0.0), past.charges
    answered, joined = past.rounds > 0, Counter(past.joined)
    for t in range(past.rounds, plan.rounds):
        if stalled(losses, plan.policy.patience):
            return
        began, up, down = time.monotonic(), fleet.traffic.up, fleet.traffic.down
        charges = plan.central.charge(charges) if plan.central else ()
        cohort = _cohort(fleet, plan, t, joined)
        jobs = {c.id: _job(strategy, state, c, plan, t, spent) for c in cohort}
        bound = Clipping(clip) if plan.central else None
        got = _gather(strategy, fleet, plan, jobs, bound)
        spent |= got.spent
        joined.update(got.spent.keys())
        exactness = release = None
        if enough := _is_enough(got, t, cohort, plan):
            answered = True
            if plan.central and bound:
                release = plan.central.release(bound, _start(strategy, state), t, charges)
                got.updates, got.weights, clip = [release.update], [1.0], release.next_clip
            state = strategy.aggregate(state, got.updates, got.weights)
            adapter = check(strategy, state, lora, t)
            exactness = distance(adapter, jobs, got.each, plan.exactness) if plan.exactness else None
        values, clients = _evaluate(strategy, state, fleet, plan, t)
        losses += [values["loss"]] if values else []
        yield Round(
            number=t + 1,
            state=state,
            asked=tuple(jobs),
            failed=got.failed,
            train_loss=got.loss if enough else None,
            eval=values,
            eval_clients=clients,
            bytes_up=fleet.traffic.up - up,
            bytes_down=fleet.traffic.down - down,
            seconds=time.monotonic() - began,
            notes=strategy.notes(state),
            exactness=exactness,
            spent=dict(spent),
            central=release,
        )
    if not answered:
        raise RoundFailed(f"no client answered in any of {plan.rounds} rounds; see the reasons above")


def _gather(
    strategy: Strategy[Any],
    fleet: Fleet,
    plan: Plan,
    jobs: Mapping[int, Job],
    bound: Clipping | None,
) -> Gathered:
    """Have the jobs done, and what came of them: by sums alone where the run says so."""
    uniform = plan.policy.weights == "uniform"
    if plan.secure:
        return secure_aggregation.gather(fleet, jobs, plan.secure, uniform, bound)
    answers = fleet.train({i: narrow(job) for i, job in jobs.items()})
    weigh: Callable[[Update], float] = (lambda _: 1.0) if uniform else (lambda update: float(update.examples))
    return gather(jobs, answers, weigh, strategy.sums_only, plan.exactness is not None, bound)


def _is_enough(got: Gathered, t: int, cohort: Sequence[Client], plan: Plan) -> bool:
    """Did a quorum answer? Of a Poisson sample, which may be empty, that may be none."""
    enough = got.answered >= max(int(not plan.central), plan.policy.quorum * len(cohort))
    if not enough and plan.policy.below_quorum == "stop":
        raise RoundFailed(_too_few(t, got.answered, got.failed, plan))
    return enough


def _cohort(fleet: Fleet, plan: Plan, t: int, joined: Mapping[int, int]) -> list[Client]:
    """The clients of round t; who has joined as many rounds as its noise is for is not asked again."""
    clients = fleet.clients()
    if plan.central:
        return plan.central.sample(clients, t)
    if plan.terms:
        clients = [c for c in clients if joined.get(c.id, 0) < plan.terms.joins]
        if not clients:
            raise RoundFailed(
                f"round {t + 1}: every client has joined dp.joins = {plan.terms.joins} rounds, and has no budget for "
                "more; the rounds before are kept"
            )
    return sample(clients, plan.cohort, plan.seed, t)


def _start(strategy: Strategy[Any], state: Any) -> LoRA:
    """The sides that all clients share, as this round's clients were given them: the highest rank has all of it."""
    job = strategy.client_init(state, Client(id=0, examples=1, rank=2**31))
    return job.start.only(job.shares)


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


def _job(
    strategy: Strategy[Any], state: Any, client: Client, plan: Plan, t: int, spent: Mapping[int, Spent] | None = None
) -> Job:
    job = strategy.client_init(state, client)
    known = spent[client.id].charges if spent and client.id in spent else 0
    privacy = plan.terms.of(client, known) if plan.terms else None
    filled = {"seed": plan.seed, "round": t, "rounds": plan.rounds, "metrics": plan.metrics, "privacy": privacy}
    return _small(replace(job, training=plan.training, **filled), strategy, plan)  # type: ignore[arg-type]


def _small(job: Job, strategy: Strategy[Any], plan: Plan) -> Job:
    """The job with how its numbers travel; masks, and changes of a product, go as they are."""
    if plan.messages.down == "bfloat16":
        job = replace(job, start=map_factors(lambda t: t.bfloat16().to(t.dtype), job.start))
    if plan.secure or job.resumes:
        return job
    stays = strategy.continues and not job.sketch  # what was left out is a change of the same factors as next time's
    return replace(job, upload=plan.messages.up, feedback=plan.messages.feedback and stays)


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


def _too_few(t: int, answered: int, failed: Mapping[int, Failure], plan: Plan) -> str:
    asked = answered + len(failed)
    why = "; ".join(f"client {i}: {failure.reason}" for i, failure in list(failed.items())[:3])
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return (
        f"round {t + 1}: {answered} of {asked} clients answered, "
        f"server.quorum = {plan.policy.quorum:g} needs more ({why}{more})"
    )
