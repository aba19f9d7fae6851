"""After the last round: what each client then does for its own use, and how well its own model does where it may tell.

A stage is a job like a round's, of which nothing is sent: an answer says that it is done. Nothing of it is charged, as
nothing is released. Scores are asked for only where clients tell theirs in rounds too.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

from fedlora.errors import Failure
from fedlora.jobs import Client, Job
from fedlora.lora import LoRA
from fedlora.message_types import Stage
from fedlora.metrics import Metrics, headline, spread
from fedlora.run.plan import Plan, job_for
from fedlora.run.sides import asked_of_clients
from fedlora.sections import Training
from fedlora.server.cohort import Cohort
from fedlora.server.rounds import Fleet, answers_and_failures
from fedlora.strategy import Strategy

log = logging.getLogger("fedlora")


def personalise(
    strategy: Strategy[Any], state: Any, fleet: Fleet, lora: LoRA, plan: Plan, rounds: int
) -> dict[str, Any]:
    """Have every client do the stages of the plan, after so many rounds; return what is told of them, for the disk.

    `lora` is the adapter as PEFT made it, from which a model that is trained alone begins.
    """
    clients, t = fleet.clients(), rounds - 1
    jobs: dict[str, dict[int, Job]] = {}
    failed: dict[str, dict[str, str]] = {}
    for stage in _stages(plan):
        start = state if stage == "personal" else strategy.init(lora)
        jobs[stage] = {c.id: stage_job(strategy, start, c, plan, stage, t) for c in clients}
        failed[stage] = _done(fleet, jobs[stage])
    scored = Cohort(plan).evaluated(clients, t) if _tells_scores(plan) else []
    before = {c.id: job_for(strategy, state, c, plan, t) for c in scored}
    told = {row: _measured(fleet, {i: own[i] for i in before}) for row, own in {"before": before, **jobs}.items()}
    return {"round": rounds, **vars(plan.personal), "clients": len(clients), "failed": failed, **_figures(told)}


def _tells_scores(plan: Plan) -> bool:
    """Do clients tell how well their own models do, in rounds and so here?"""
    return plan.evaluate_clients and plan.metrics and not plan.secure


def _stages(plan: Plan) -> list[Stage]:
    stages: dict[Stage, bool] = {"personal": plan.personal.steps > 0, "alone": plan.personal.alone}
    return [stage for stage, is_asked in stages.items() if is_asked]


def stage_job(strategy: Strategy[Any], state: Any, client: Client, plan: Plan, stage: Stage, t: int) -> Job:
    """What a client is to do for its own use after round t: no noise, no mask, and no word of it."""
    quiet = replace(plan, record_level=None, secure=None, metrics=False, messages=replace(plan.messages, up="float32"))
    job = job_for(strategy, state, client, quiet, t)
    trains = asked_of_clients(strategy, plan.rounds).trains  # of all rounds: some strategies take turns
    return replace(
        job,
        trains="".join(s for s in trains if job.start.side(s)),
        training=_training(job.training, plan, stage),
        turns=(),
        smoothing=(),
        scales=False,
        right={},
        left={},
        correction=LoRA(),
        feedback=False,
        stage=stage,
    )


def _training(training: Training, plan: Plan, stage: Stage) -> Training:
    """How a client trains in a stage: alone as long as in all rounds."""
    if stage == "alone":
        return replace(training, steps=plan.rounds * training.steps, epochs=plan.rounds * training.epochs)
    personal = plan.personal
    return replace(training, steps=personal.steps, prox=personal.prox, lr=personal.lr or training.lr)


def _done(fleet: Fleet, jobs: Mapping[int, Job]) -> dict[str, str]:
    """Have the jobs done; why each client that failed did, in the words that may be public."""
    answers = dict(fleet.train(jobs))
    failures = {i: answers.get(i, Failure("no answer")) for i in jobs}
    failed = {i: failure for i, failure in failures.items() if isinstance(failure, Failure)}
    for i, failure in failed.items():
        log.warning("client %d failed in what it does for its own use: %s", i, failure.reason)
    return {str(i): failure.public for i, failure in failed.items()}


def _measured(fleet: Fleet, jobs: Mapping[int, Job]) -> dict[int, Metrics]:
    """The metrics of each client's own model on its held-out examples."""
    return answers_and_failures(jobs, fleet.evaluate(jobs))[0] if jobs else {}


def _figures(told: Mapping[str, Mapping[int, Metrics]]) -> dict[str, Any]:
    """Mean, worst and spread over clients of every kind of model, each client's own figure, and who lost by a stage."""
    rows = {row: figures for row, clients in told.items() if (figures := spread(clients))}
    if not rows:
        return {}
    name = str(next(iter(rows.values()))["metric"])
    each = {row: _values(told[row], name) for row in rows}
    before, sign = each.get("before", {}), 1 if headline({name: 0.0})[1] else -1
    lost = {row: _below(before, values, sign) for row, values in each.items() if row != "before"}
    return {"rows": rows, "each": {row: _by_word(values) for row, values in each.items()}, "lost": lost}


def _values(clients: Mapping[int, Metrics], name: str) -> dict[int, float]:
    values = {i: metrics.values() for i, metrics in clients.items() if metrics.targets}
    return {i: v[name] for i, v in values.items() if name in v}


def _below(before: Mapping[int, float], after: Mapping[int, float], sign: int) -> list[int]:
    """The clients whose figure after is worse than before; `sign` is -1 where less is better."""
    return [i for i, value in after.items() if sign * value < sign * before.get(i, -sign * inf)]


def _by_word(values: Mapping[int, float]) -> dict[str, float]:
    return {str(i): value for i, value in values.items()}
