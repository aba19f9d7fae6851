"""The round loop, and the one seam between an algorithm and where clients run."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedlora.errors import Failure, PrivacyError, RoundFailed, StrategyError, nearest
from fedlora.jobs import HIGHEST_RANK, Client, Job, PrivacySpent, SecAggStep, Update
from fedlora.lora import LoRA, map_factors
from fedlora.messages.parts import PartTracker
from fedlora.messages.sketch import select_rows
from fedlora.metrics import Metrics, spread
from fedlora.privacy.client_level import ClippedSum, NoisedUpdate
from fedlora.run.plan import Plan, ResumePoint, RoundResult
from fedlora.sections import Training
from fedlora.server import secure_aggregation
from fedlora.server.aggregation import Answers, Collected, collect
from fedlora.server.exactness import aggregation_error
from fedlora.strategy import Strategy, check_declarations, next_state

log = logging.getLogger("fedlora")
FILLED_IN = {  # field of a Job -> what a strategy that sets it is to do instead
    "training": "name in Job.overrides the settings in which a client differs, and in Job.lr_factor by how much",
    "privacy": "leave it out; dp.epsilon or dp.noise turns it on",
    "masking": "leave it out; secure.aggregation turns it on",
    "metrics": "leave it out; dp.metrics sets it",
    "upload": "leave it out; messages.up sets it",
    "feedback": "leave it out; messages.feedback sets it",
    "seed": "leave it out, and keep a seed of the strategy's own among its options",
    "round": "leave it out, and count rounds in the state",
    "rounds": "leave it out; rounds sets it",
}
SETTINGS = TypeAdapter(Training)
ACCOUNTED = ("epochs", "steps", "batch_size", "accumulate", "clip")  # training settings behind a private run's noise


class Fleet(Protocol):
    """Somewhere clients run: this process, Flower's simulation, or machines elsewhere."""

    traffic: PartTracker

    def clients(self) -> Sequence[Client]:
        """The clients that may be asked, known by their ids."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job, handing over each answer as it comes; a client that failed has a `Failure`, or is missing."""

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """A step of secure aggregation by each client, and what it says."""

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The model of every job, with what its client keeps, on that client's held-out examples."""


def fit(
    strategy: Strategy[Any], fleet: Fleet, lora: LoRA, plan: Plan, past: ResumePoint | None = None
) -> Iterator[RoundResult]:
    """Run the rounds that are left, yielding after each.

    Raises `RoundFailed` where too few clients answer, and `StrategyError` or `PrivacyError` for a strategy that
    contradicts itself or the run.
    """
    check_declarations(strategy)
    if strategy.needs_senders and (plan.secure or plan.client_level):
        raise PrivacyError(
            f"strategy {type(strategy).__name__} must know which client sent which update, and here the server gets "
            "sums alone; leave out secure.aggregation and dp.level = client, or take a strategy that declares sums_only"
        )
    run = _Run(strategy, fleet, lora, plan)
    past = past or ResumePoint(0, strategy.init(lora))
    answered = past.rounds > 0
    while past.rounds < plan.rounds:
        if stalled(past.losses, plan.policy.patience):
            return
        done, past = run.play(past)
        answered = answered or not done.skipped
        yield done
    if not answered:
        raise RoundFailed(f"no client answered in any of {plan.rounds} rounds; see the reasons above")


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What a round made of the updates."""

    state: Any
    skipped: bool = False  # too few clients answered, and the state is as it was
    release: NoisedUpdate | None = None  # where the run hides clients
    exactness: float | None = None  # where it is measured


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """What an evaluation found; None where there was none."""

    values: Mapping[str, float] | None = None  # of the global model
    clients: Mapping[int, Metrics] | None = None  # of each client's model on its own held-out examples


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over the rounds of a run."""

    strategy: Strategy[Any]
    fleet: Fleet
    lora: LoRA  # the adapter as PEFT made it
    plan: Plan

    def play(self, past: ResumePoint) -> tuple[RoundResult, ResumePoint]:
        """The next round, and where the one after it takes up."""
        client_level, traffic = self.plan.client_level, self.fleet.traffic
        began, up, down = time.monotonic(), traffic.up, traffic.down
        if client_level:
            past = replace(past, charges=client_level.charge(past.charges), clip=past.clip or client_level.clip)
        jobs = self._jobs(past)
        bound = ClippedSum(past.clip) if past.clip else None
        got = self._collect(jobs, bound)
        past = past.with_spent(got.spent)
        outcome = self._aggregate(past, jobs, got, bound)
        found = self._evaluate(outcome.state, past.rounds)
        after = self._after(past, outcome, found)
        done = RoundResult(
            number=after.rounds,
            state=outcome.state,
            asked=tuple(jobs),
            failed=got.failed,
            train_loss=None if outcome.skipped else got.loss,
            eval=found.values,
            eval_clients=None if found.clients is None else spread(found.clients),
            bytes_up=traffic.up - up,
            bytes_down=traffic.down - down,
            seconds=time.monotonic() - began,
            notes=self.strategy.notes(outcome.state),
            exactness=outcome.exactness,
            spent=past.spent,
            client_level=outcome.release,
            scores=after.scores,
            skipped=outcome.skipped,
        )
        return done, after

    def _jobs(self, past: ResumePoint) -> dict[int, Job]:
        """The work of every client of the round."""
        clients = _cohort(self.fleet, self.plan, past.rounds, past.joined)
        return {c.id: self._job(past.state, c, past.rounds, past.spent.get(c.id)) for c in clients}

    def _job(self, state: Any, client: Client, t: int, spent: PrivacySpent | None = None) -> Job:
        return job_for(self.strategy, state, client, self.plan, t, spent)

    def _collect(self, jobs: Mapping[int, Job], bound: ClippedSum | None) -> Collected:
        """Have the jobs done, and collect what came of them: by sums alone where the run says so."""
        plan = self.plan
        uniform = plan.policy.weights == "uniform"
        if plan.secure:
            return secure_aggregation.collect_masked(self.fleet, jobs, plan.secure, uniform=uniform, instead=bound)
        answers = self.fleet.train({i: select_rows(job) for i, job in jobs.items()})
        weigh: Callable[[Update], float] = (lambda _: 1.0) if uniform else (lambda update: float(update.examples))
        return collect(jobs, answers, weigh, self.strategy.sums_only, plan.exactness is not None, bound)

    def _aggregate(
        self, past: ResumePoint, jobs: Mapping[int, Job], got: Collected, bound: ClippedSum | None
    ) -> _Outcome:
        """The next state; the same one where too few clients answered, and the run is to go on."""
        plan, t = self.plan, past.rounds
        if not _is_enough(got, len(jobs), t, plan):
            return _Outcome(past.state, skipped=True)
        updates, weights, release = got.updates, got.weights, None
        if plan.client_level and bound:
            release = plan.client_level.release(bound, _start(self.strategy, past.state), t, past.charges)
            updates, weights = [release.update], [1.0]
        senders = [replace(sender, metrics=past.scores.get(sender.id, {})) for sender in got.senders]
        state = next_state(self.strategy, past.state, updates, weights, senders)
        adapter = validate_adapter(self.strategy, state, self.lora, t)
        exactness = aggregation_error(adapter, jobs, got.each, plan.exactness) if plan.exactness else None
        return _Outcome(state, release=release, exactness=exactness)

    def _evaluate(self, state: Any, t: int) -> _Evaluation:
        """The global model, and each client's own, in the rounds that are evaluated."""
        plan, every = self.plan, self.plan.policy.eval_every
        is_due = t + 1 == plan.rounds or (every and (t + 1) % every == 0)
        if not is_due:
            return _Evaluation()
        values = plan.evaluate(self.strategy.adapter(state)).values() if plan.evaluate else None
        if not plan.evaluate_clients:
            return _Evaluation(values)
        jobs = {c.id: self._job(state, c, t) for c in self.fleet.clients()}
        return _Evaluation(values, answers_and_failures(jobs, self.fleet.evaluate(jobs))[0])

    def _after(self, past: ResumePoint, outcome: _Outcome, found: _Evaluation) -> ResumePoint:
        """Where the next round takes up."""
        losses = (*past.losses, found.values["loss"]) if found.values else past.losses
        scores = past.scores
        if self.strategy.needs_senders and found.clients:
            scores = {**scores, **{i: metrics.values() for i, metrics in found.clients.items()}}
        clip = outcome.release.next_clip if outcome.release else past.clip
        return replace(past, rounds=past.rounds + 1, state=outcome.state, losses=losses, clip=clip, scores=scores)


def _is_enough(got: Collected, asked: int, t: int, plan: Plan) -> bool:
    """Did a quorum answer? Of a Poisson sample, which may be empty, that may be none."""
    enough = got.answered >= max(int(not plan.client_level), plan.policy.quorum * asked)
    if not enough and plan.policy.below_quorum == "stop":
        raise RoundFailed(_too_few(t, got.answered, got.failed, plan))
    return enough


def _cohort(fleet: Fleet, plan: Plan, t: int, joined: Mapping[int, int]) -> list[Client]:
    """The clients of round t; a client that has joined as many rounds as its noise is for is not asked again."""
    clients = fleet.clients()
    if plan.client_level:
        return plan.client_level.sample(clients, t)
    if plan.record_level:
        clients = [c for c in clients if joined.get(c.id, 0) < plan.record_level.max_participations]
    if plan.record_level and not clients:
        raise RoundFailed(
            f"round {t + 1}: every client has joined dp.joins = {plan.record_level.max_participations} rounds, and has "
            "no budget for more; the rounds before are kept"
        )
    return sample(clients, plan.cohort, plan.seed, t)


def _start(strategy: Strategy[Any], state: Any) -> LoRA:
    """The sides that all clients share, as this round's clients were given them: the highest rank has all of it."""
    job = strategy.client_init(state, HIGHEST_RANK)
    return job.start.only(job.shares)


def sample(clients: Sequence[Client], cohort: int, seed: int, t: int) -> list[Client]:
    """The clients of round t, drawn without replacement by (seed, round) alone, in the order of their ids."""
    ordered = sorted(clients, key=lambda c: c.id)
    chosen = Random(f"{seed}/cohort/{t}").sample(ordered, min(cohort, len(ordered)))
    return sorted(chosen, key=lambda c: c.id)


def answers_and_failures(jobs: Mapping[int, Job], answers: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, str]]:
    """The answers that clients gave, in the order of the jobs, and why the other clients gave none."""
    good: dict[int, Any] = {}
    bad: dict[int, str] = {}
    for i in jobs:
        answer = answers.get(i, Failure("no answer"))
        if isinstance(answer, Failure):
            bad[i] = answer.reason
            log.warning("client %d failed: %s", i, answer.reason)
        else:
            good[i] = answer
    return good, bad


def stalled(losses: Sequence[float], patience: int) -> bool:
    """Have the last `patience` evaluations all failed to go below the best before them?"""
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def validate_adapter(strategy: Strategy[Any], state: Any, like: LoRA, t: int) -> LoRA:
    """The adapter of a state; refused where no client could load it, naming the matrix."""
    adapter = strategy.adapter(state)
    for misfit in _misfits(adapter, like):
        raise StrategyError(f"round {t + 1}: strategy {type(strategy).__name__} returned {misfit}")
    for _, module, matrix in adapter.matrices():
        if not bool(torch.isfinite(matrix).all()):
            raise StrategyError(f"round {t + 1}: the new adapter is not finite at {module}; a lower train.lr may help")
    return adapter


def _misfits(adapter: LoRA, like: LoRA) -> Iterator[str]:
    """What of an adapter does not fit the modules of another, with what they take."""
    for m in like.A:
        a, b = adapter.A.get(m), adapter.B.get(m)
        if a is None or b is None:
            yield f"no {'A' if a is None else 'B'} for {m}"
        elif not _fits(a, b, like.A[m], like.B[m]):
            takes = _factors_of(a.dim(), d_in=like.A[m].shape[-1], d_out=like.B[m].shape[0])
            yield f"A {tuple(a.shape)} and B {tuple(b.shape)} for {m}; it takes {takes}"
    for m, h in like.H.items():
        got = adapter.H.get(m)
        if got is None or got.shape != h.shape:
            yield f"{'nothing' if got is None else tuple(got.shape)} for {m}; it takes {tuple(h.shape)}"


def _factors_of(dimensions: int, *, d_in: int, d_out: int) -> str:
    """The shapes of A and B that a module of this size takes, in words: matrices, or VeRA's vectors."""
    if dimensions > 1:
        return f"A (r, {d_in}) and B ({d_out}, r)"
    return f"A ({d_in},) and B ({d_out},)"


def _fits(a: Tensor, b: Tensor, like_a: Tensor, like_b: Tensor) -> bool:
    """Are these two factors of one rank, or two vectors (VeRA), for a module of this shape?"""
    if like_a.dim() == 1:
        return a.shape == like_a.shape and b.shape == like_b.shape
    if not a.dim() == b.dim() == 2:
        return False
    (rank, d_in), (d_out, rank_b) = a.shape, b.shape
    return rank == rank_b and d_in == like_a.shape[1] and d_out == like_b.shape[0]


def job_for(
    strategy: Strategy[Any], state: Any, client: Client, plan: Plan, t: int, spent: PrivacySpent | None = None
) -> Job:
    """A client's job of round t: what the strategy has it do, and what the run fills in.

    Raises `StrategyError` for a job in which the strategy sets what the run fills in, and `PrivacyError` for one that
    changes what a private run's noise was computed for.
    """
    job = strategy.client_init(state, client)
    name = type(strategy).__name__
    _check_left_to_the_run(name, job)
    if plan.record_level:
        _check_terms_are_kept(name, job, client)
    filled = replace(
        job,
        training=_training(name, job, plan.training),
        overrides={},
        lr_factor=1.0,
        seed=plan.seed,
        round=t,
        rounds=plan.rounds,
        metrics=plan.metrics,
        privacy=plan.record_level.for_client(client, known=spent.charges if spent else 0)
        if plan.record_level
        else None,
    )
    return with_encoding(filled, strategy, plan)


def _check_left_to_the_run(strategy: str, job: Job) -> None:
    """Raise `StrategyError` where a strategy has set what the run fills in, which would be lost."""
    untouched = Job(job.start)
    for name, remedy in FILLED_IN.items():
        value, default = getattr(job, name), getattr(untouched, name)
        if value != default or (name == "training" and value is not default):  # the run's may equal the default
            raise StrategyError(f"strategy {strategy} sets {name} in a Job, which the run fills in: {remedy}")


def _check_terms_are_kept(strategy: str, job: Job, client: Client) -> None:
    """Raise `PrivacyError` where a client would draw other samples, or take other steps, than its noise is for."""
    for name in ACCOUNTED:
        if name in job.overrides:
            raise PrivacyError(
                f"strategy {strategy} overrides train.{name} for client {client.id}, and a private run (dp.level = "
                "record) samples, steps and clips as its noise was computed for: leave it out of Job.overrides, or run "
                "without dp.epsilon and dp.noise"
            )


def _training(strategy: str, job: Job, run: Training) -> Training:
    """The run's training settings with what the job overrides. Raises `StrategyError` for what is no such setting."""
    if not job.overrides and job.lr_factor == 1.0:
        return run
    values = asdict(run)
    for name in job.overrides:
        if name not in values:
            raise StrategyError(f'strategy {strategy} overrides "{name}", no training setting; {nearest(name, values)}')
    values |= job.overrides
    values |= {name: job.lr_factor * values[name] for name in ("lr", "head_lr")}
    try:
        return SETTINGS.validate_python(values)
    except ValidationError as e:
        wrong = e.errors()[0]
        where = f"train.{wrong['loc'][0]}" if wrong["loc"] else "training"
        raise StrategyError(
            f"strategy {strategy} makes {where} = {wrong['input']!r} by overrides and lr_factor: {wrong['msg']}"
        ) from e


def with_encoding(job: Job, strategy: Strategy[Any], plan: Plan) -> Job:
    """The job with how its numbers travel; masks, and changes of a product, go as they are."""
    if plan.messages.down == "bfloat16":
        job = replace(job, start=map_factors(lambda t: t.bfloat16().to(t.dtype), job.start))
    if plan.secure or job.resumes:
        return job
    stays = strategy.continues and not job.sketch  # what was left out is a change of the same factors as next time's
    return replace(job, upload=plan.messages.up, feedback=plan.messages.feedback and stays)


def _too_few(t: int, answered: int, failed: Mapping[int, Failure], plan: Plan) -> str:
    asked = answered + len(failed)
    why = "; ".join(f"client {i}: {failure.reason}" for i, failure in list(failed.items())[:3])
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return (
        f"round {t + 1}: {answered} of {asked} clients answered, "
        f"server.quorum = {plan.policy.quorum:g} needs more ({why}{more})"
    )
