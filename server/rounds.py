"""The round loop, between a strategy and a fleet: jobs go out, updates come back, the strategy makes the next state."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from fedlora.errors import Failure, FailureKind, PrivacyError, RoundFailed
from fedlora.jobs import HIGHEST_RANK, Client, Job, PrivacySpent, SecAggStep, shared_start
from fedlora.lora import LoRA
from fedlora.messages.parts import PartTracker
from fedlora.messages.sketch import select_rows
from fedlora.metrics import Metrics, spread
from fedlora.privacy.client_level import ClippedSum, NoisedUpdate
from fedlora.run.plan import (
    Plan,
    Policy,
    ResumePoint,
    RoundResult,
    job_for,
    local_steps,
    never_trained,
)
from fedlora.server import charges
from fedlora.server.adapter_checks import validate_adapter
from fedlora.server.aggregation import Answers, Collected, UpdateRules, collect
from fedlora.server.cohort import Cohort
from fedlora.server.cohort import sample as sample
from fedlora.server.exactness import aggregation_error
from fedlora.server.secure_aggregation import MaskingRules, collect_masked
from fedlora.strategy import Strategy, check_declarations, innermost, next_state

log = logging.getLogger("fedlora")
NO_WEIGHTS: Mapping[int, float] = MappingProxyType({})


class Fleet(Protocol):
    """The clients of a run, wherever they are: in this process, in Flower's simulation, or on machines elsewhere."""

    traffic: PartTracker

    def clients(self) -> Sequence[Client]:
        """The clients that may be asked, known by their ids."""

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job; yield each answer as it comes. A client that failed has a `Failure`, or is missing."""

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have each client do its step of secure aggregation; the result is what each says."""

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Measure the model of every job, with what its client keeps, on that client's held-out examples."""


@runtime_checkable
class Timed(Protocol):
    """A fleet of simulated clients on a clock, which tells who answers in time."""

    simulated_seconds: float  # since the run began


def fit(
    strategy: Strategy[Any], fleet: Fleet, lora: LoRA, plan: Plan, past: ResumePoint | None = None
) -> Iterator[RoundResult]:
    """Run the rounds that are left, yielding after each.

    Raises `RoundFailed` where too few clients answer, and `StrategyError` or `PrivacyError` for a strategy that
    contradicts itself or the run.
    """
    check_declarations(strategy)
    _check_senders_are_known(strategy, plan)
    run = RunLoop(strategy, fleet, lora, plan, Cohort(plan))
    past = past or ResumePoint(0, strategy.init(lora))
    if isinstance(fleet, Timed):
        fleet.simulated_seconds = past.clock
    answered = past.rounds > 0
    while past.rounds < plan.rounds:
        if stalled(past.losses, plan.policy.patience):
            return
        done, past = run.play(past)
        answered = answered or not done.skipped
        yield done
    if not answered:
        raise RoundFailed(f"no client answered in any of {plan.rounds} rounds; see the reasons above")


def _check_senders_are_known(strategy: Strategy[Any], plan: Plan) -> None:
    """Raise `PrivacyError` for a strategy that must know who sent what, or each one's loss, in a run that hides it."""
    name = type(innermost(strategy)).__name__
    if strategy.needs_losses and not plan.metrics:
        raise PrivacyError(
            f"strategy {name} must know every client's training loss, which no noise hides, and clients of a private "
            "run do not tell it; set dp.metrics = true if they may, or take a strategy that needs no losses"
        )
    if strategy.needs_senders and (plan.secure or plan.client_level):
        raise PrivacyError(
            f"strategy {name} must know which client sent which update, and here the server gets sums alone; leave out "
            "secure.aggregation and dp.level = client, or take a strategy that declares sums_only"
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """The state after a round, and what was measured on the way."""

    state: Any
    skipped: bool = False  # too few clients answered, and the state is as it was
    release: NoisedUpdate | None = None  # where the run hides clients
    exactness: float | None = None  # where it is measured


@dataclass(frozen=True)
class RoundStart:
    """Where the clock and the counts of bytes stood when a round began."""

    seconds: float
    up: int
    down: int

    @classmethod
    def now(cls, fleet: Fleet) -> "RoundStart":
        """Where they stand now."""
        return cls(time.monotonic(), fleet.traffic.up, fleet.traffic.down)


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """The result of an evaluation; None for what was not evaluated."""

    values: Mapping[str, float] | None = None  # of the global model
    clients: Mapping[int, Metrics] | None = None  # of each client's model on its own held-out examples


@dataclass(frozen=True, eq=False)
class RunLoop:
    """What stays the same over the rounds of a run."""

    strategy: Strategy[Any]
    fleet: Fleet
    lora: LoRA  # the adapter as PEFT made it
    plan: Plan
    cohort: Cohort

    def play(self, past: ResumePoint) -> tuple[RoundResult, ResumePoint]:
        """Play the next round; return its result, and what the round after it starts from."""
        client_level, start = self.plan.client_level, RoundStart.now(self.fleet)
        if client_level:
            past = replace(past, charges=client_level.charge(past.charges), clip=past.clip or client_level.clip)
        clients, jobs = self._jobs(past)
        clipped_sum = ClippedSum(past.clip) if past.clip else None
        if past.rounds == 0:
            _warn_of_sides_that_rest(clients, jobs)
        got = self._collect(jobs, clipped_sum)
        spent = charges.after_round(self.plan.record_level, past, clients, got)
        past = past.with_spent(spent)
        outcome = self._aggregate(past, jobs, got, clipped_sum, last=self.strategy.exchanges == 1)
        if self.strategy.exchanges > 1 and not outcome.skipped:
            outcome = self._exchanged_again(past, clients, outcome.state, got)
        return self.finish(past, start, got, outcome, asked=tuple(jobs), charged=spent.keys())

    def finish(
        self,
        past: ResumePoint,
        start: "RoundStart",
        got: Collected,
        outcome: Outcome,
        *,
        asked: tuple[int, ...],
        charged: Collection[int],
    ) -> tuple[RoundResult, ResumePoint]:
        """Evaluate the state after a round; return the round's result, and what the round after it starts from."""
        found = self._evaluate(outcome.state, past.rounds)
        after = self._after(past, outcome, found)
        traffic = self.fleet.traffic
        done = RoundResult(
            number=after.rounds,
            state=outcome.state,
            asked=asked,
            failed=got.failed,
            train_loss=None if outcome.skipped else got.loss,
            eval=found.values,
            eval_clients=None if found.clients is None else spread(found.clients),
            bytes_up=traffic.up - start.up,
            bytes_down=traffic.down - start.down,
            seconds=time.monotonic() - start.seconds,
            notes=self.strategy.notes(outcome.state),
            exactness=outcome.exactness,
            spent=past.spent,
            charged=charged,
            client_level=outcome.release,
            scores=after.scores,
            each=self._each(got, found.clients or {}) if self.plan.tells_each else None,
            skipped=outcome.skipped,
            clock=self.fleet.simulated_seconds if isinstance(self.fleet, Timed) else None,
        )
        return done, after

    def _each(self, got: Collected, evaluated: Mapping[int, Metrics]) -> dict[int, dict[str, float]]:
        """The own figures of every client whose update was used in a round, or whose model was measured after it."""
        known = {client.id: client for client in self.fleet.clients()}
        scored = {i: metrics for i, metrics in evaluated.items() if metrics.targets}
        each: dict[int, dict[str, float]] = {}
        for i in got.examples.keys() | scored.keys():
            each[i] = {"rank": known[i].rank} if i in known else {}
            each[i] |= {"examples": got.examples[i]} if i in got.examples else {}
            each[i] |= {"train_loss": got.losses[i]} if i in got.losses else {}
            each[i] |= {"heldout": scored[i].examples, **scored[i].values()} if i in scored else {}
        return each

    def _exchanged_again(self, past: ResumePoint, clients: Sequence[Client], state: Any, got: Collected) -> Outcome:
        """Make the second pass over the clients that are in the first; return the state after the round.

        `state` is what the first pass has left. Nothing is trained, and so nothing charged. Failures of this pass are
        added to those in `got`. Where too few answer, the state is as it was before the round.
        """
        between, asked = replace(past, state=state), len(clients)
        there = [c for c in clients if c.id not in got.failed]
        jobs = {c.id: self.job(state, c, past.rounds, past.spent.get(c.id)) for c in there}
        again = self._collect(jobs, None, before=got.in_sum)
        got.failed |= again.failed
        again.failed = got.failed  # what the quorum is held against is the whole round
        outcome = self._aggregate(between, jobs, again, None, asked=asked)
        return replace(outcome, state=past.state) if outcome.skipped else outcome

    def _jobs(self, past: ResumePoint) -> tuple[list[Client], dict[int, Job]]:
        """The clients of the round, and the job of each.

        A client whose counts make noise that cannot be computed is left out; where that is so for all, it is raised.
        """
        clients = self.cohort.draw(self.fleet.clients(), past.rounds, past.joined)
        jobs: dict[int, Job] = {}
        errors: list[PrivacyError] = []
        for c in clients:
            try:
                jobs[c.id] = self.job(past.state, c, past.rounds, past.spent.get(c.id))
            except PrivacyError as e:
                errors.append(e)
        if errors and not jobs:
            raise errors[0]
        for c, error in zip([c for c in clients if c.id not in jobs], errors, strict=True):
            self.cohort.leave_out(c, str(error))
        return [c for c in clients if c.id in jobs], jobs

    def job(self, state: Any, client: Client, t: int, spent: PrivacySpent | None = None) -> Job:
        """The job of a client in round t; `spent` is what its ledger said last."""
        return job_for(self.strategy, state, client, self.plan, t, spent)

    def _collect(
        self, jobs: Mapping[int, Job], clipped_sum: ClippedSum | None, before: Mapping[int, float] = NO_WEIGHTS
    ) -> Collected:
        """Hand out the jobs and collect the updates: by sums alone where the run says so.

        `before` has the weights of the clients in the round's first masked sum, where this is its second.

        A job is narrowed to its sketch here, and an update is widened where it is collected; a masked one is not, as
        only its client can see it.
        """
        plan = self.plan
        rules = update_rules(plan.policy)
        if plan.secure:
            masking = MaskingRules(
                secure=plan.secure,
                uniform=rules.uniform,
                largest_step=rules.largest_step,
                clip=clipped_sum.clip if clipped_sum else 0.0,
            )
            clients = {client.id: client for client in self.fleet.clients()}
            return collect_masked(self.fleet, jobs, clients, masking, clipped_sum, before)
        answers = self.fleet.train({i: select_rows(job) for i, job in jobs.items()})
        keep = plan.exactness is not None
        return collect(jobs, answers, rules, sums=self.strategy.sums_only, keep=keep, clipped_sum=clipped_sum)

    def _aggregate(
        self,
        past: ResumePoint,
        jobs: Mapping[int, Job],
        got: Collected,
        clipped_sum: ClippedSum | None,
        *,
        asked: int = 0,
        last: bool = True,
    ) -> Outcome:
        """Make the next state; where too few clients answered and the run goes on, the state stays the same.

        `asked` clients make the round, where these jobs are not of all; `last` says whether the round ends with them.
        """
        plan, t = self.plan, past.rounds
        if not _is_enough(got, asked or len(jobs), t, plan):
            return Outcome(past.state, skipped=True)
        updates, weights, release = got.updates, got.weights, None
        if plan.client_level and clipped_sum:
            release = plan.client_level.release(clipped_sum, _start(self.strategy, past.state), t, past.charges)
            updates, weights = [release.update], [1.0]
        senders = [replace(sender, metrics=past.scores.get(sender.id, {})) for sender in got.senders]
        state = next_state(self.strategy, past.state, updates, weights, senders)
        if not last:
            return Outcome(state)
        adapter = validate_adapter(self.strategy, state, self.lora, t)
        exactness = aggregation_error(adapter, jobs, got.each, plan.exactness) if plan.exactness else None
        return Outcome(state, release=release, exactness=exactness)

    def _evaluate(self, state: Any, t: int) -> _Evaluation:
        """Measure the global model and each client's own, if the round is one that is evaluated."""
        plan = self.plan
        if not _is_evaluated(t, plan):
            return _Evaluation()
        values = evaluation(plan, self.strategy.adapter(state), t + 1) or None
        if not plan.evaluate_clients:
            return _Evaluation(values)
        jobs = {c.id: self.job(state, c, t) for c in self.cohort.evaluated(self.fleet.clients(), t)}
        return _Evaluation(values, answers_and_failures(jobs, self.fleet.evaluate(jobs))[0])

    def _after(self, past: ResumePoint, outcome: Outcome, found: _Evaluation) -> ResumePoint:
        """What the next round starts from."""
        after = replace(past, rounds=past.rounds + 1, state=outcome.state)
        if outcome.release:
            after = replace(after, clip=outcome.release.next_clip)
        if found.values:
            after = replace(after, losses=(*past.losses, found.values["loss"]))
        if self.strategy.needs_senders and found.clients:
            after = replace(after, scores={**past.scores, **_scores(found.clients)})
        return after


def update_rules(policy: Policy) -> UpdateRules:
    """The rules by which the server's settings have updates weighed and refused."""
    return UpdateRules(
        uniform=policy.weights == "uniform",
        max_share=policy.max_share,
        largest_step=policy.largest_step,
        step_ratio=policy.step_ratio,
    )


def _is_evaluated(t: int, plan: Plan) -> bool:
    """Is round t one after which the models are measured? The last one always is."""
    every = plan.policy.eval_every
    is_last = t + 1 == plan.rounds
    return is_last or (every > 0 and (t + 1) % every == 0)


def evaluation(plan: Plan, adapter: LoRA, rounds: int) -> dict[str, float]:
    """The figures of the global model after so many rounds; of its generated answers too, where it is time for them."""
    if not plan.evaluate:
        return {}
    values = plan.evaluate(adapter).values()
    every = plan.generate_every
    is_time = rounds in (0, plan.rounds) or (every > 0 and rounds % every == 0)
    return values | dict(plan.generate(adapter, rounds)) if plan.generate and is_time else values


def _scores(clients: Mapping[int, Metrics]) -> dict[int, dict[str, float]]:
    """The metrics that each client told, without the clients that have no held-out examples."""
    return {i: metrics.values() for i, metrics in clients.items() if metrics.targets}


def _is_enough(got: Collected, asked: int, t: int, plan: Plan) -> bool:
    """Did a quorum answer? With client-level privacy a round counts without one, as noise alone if need be.

    How many answer depends on who was drawn, so a round that is skipped, or ends the run, would tell it. Without it,
    raises `RoundFailed` where no quorum answered and the run is to stop then. A client that has masked its update
    before, and masks none again, did answer this round: what was lost is the sum, as when a server was killed. That
    round is skipped, and the run goes on.
    """
    if plan.client_level:
        if got.answered < plan.policy.quorum * asked:
            log.warning("round %d: %d of %d answered, and it is released all the same", t + 1, got.answered, asked)
        return True
    needed = max(1, plan.policy.quorum * asked)
    if got.answered >= needed:
        return True
    masked = sum(failure.kind == FailureKind.MASKED for failure in got.failed.values())
    if plan.policy.below_quorum == "stop" and got.answered + masked < needed:
        raise RoundFailed(_too_few(t, got.answered, got.failed, plan))
    log.warning("round %d is skipped: %d of %d answers are in a sum", t + 1, got.answered, asked)
    return False


def _warn_of_sides_that_rest(clients: Sequence[Client], jobs: Mapping[int, Job]) -> None:
    """Say of a run's first round whose local steps are too few for every side to have its turn, if anybody's."""
    resting = {c.id: never_trained(jobs[c.id], steps=local_steps(jobs[c.id], c)) for c in clients}
    if idle := [i for i, sides in resting.items() if sides]:
        log.warning(
            "%d of %d clients (client %d is one) take so few steps a round that they never train %s: the strategy "
            "trains sides in turn, step by step; set train.steps, or more epochs or smaller batches",
            *(len(idle), len(clients), idle[0], ", ".join(resting[idle[0]])),
        )


def _start(strategy: Strategy[Any], state: Any) -> LoRA:
    """The shared sides as this round's clients were given them, whole: a client of the highest rank has all of them."""
    return shared_start(strategy.client_init(state, HIGHEST_RANK))


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


def _too_few(t: int, answered: int, failed: Mapping[int, Failure], plan: Plan) -> str:
    """The sentence about a round without a quorum, with the first three reasons."""
    asked = answered + len(failed)
    why = "; ".join(f"client {i}: {failure.reason}" for i, failure in list(failed.items())[:3])
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return (
        f"round {t + 1}: {answered} of {asked} clients answered, "
        f"server.quorum = {plan.policy.quorum:g} needs more ({why}{more})"
    )
