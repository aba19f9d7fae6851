"""One run of a comparison in this process, and its record: what it cost, and how good the models are that came of it.

What a client holds out falls in two halves. By one of them something may be chosen, as a learning rate ("choice"); on
the other one, and on the test split, models are measured ("own", "test"). Where clients have no common model, the test
split is put to each client's own, and the figure of an example is the mean over them.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial, reduce
from hashlib import sha256
from operator import add
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from fedlora import config as configuration
from fedlora.client.policy import policy_of
from fedlora.client.stacked import evaluation
from fedlora.client.training import EvaluationTask, load_start
from fedlora.config import Config
from fedlora.data.rows import Rows, pool, row_hashes, take
from fedlora.encoding.client_data import ClientData
from fedlora.errors import RoundFailed
from fedlora.jobs import Client, Job
from fedlora.kernels.evaluation import measure_each
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics, headline, spread
from fedlora.models.model import Model
from fedlora.run.client_ranks import ranks
from fedlora.run.compose import compose
from fedlora.run.own_code_checks import check_training
from fedlora.run.plan import Plan, RoundResult
from fedlora.run.setup import RunSetup, mute_transformers, prepare, resolve
from fedlora.run.sides import kept_by_clients
from fedlora.sections import PersonalConfig, Policy, PrivacyConfig
from fedlora.server.personal import stage_job
from fedlora.server.rounds import Fleet, answers_and_failures, fit
from fedlora.server.run import plan_of, rounds_left
from fedlora.simulations.fleets import fleet_here, on_clock
from fedlora.simulations.local_clients import LocalClients
from fedlora.strategy import Strategy

from .baselines import pooled_training
from .packed import pack

Told = Callable[[int, int], None]  # rounds that are done, of how many
HALVES = ("choice", "own")


@dataclass(eq=False)
class Prepared:
    """What runs that train the same adapter on the same rows have in common."""

    setup: RunSetup

    @cached_property
    def halves(self) -> dict[str, tuple[Rows, ...]]:
        """The rows of each half of what every client holds out."""
        return {
            half: tuple(_every_other(data.heldout_rows, start) for data in self.setup.clients_data)
            for start, half in enumerate(HALVES)
        }

    @cached_property
    def pooled(self) -> ClientData:
        """All training rows in one place."""
        first = self.setup.clients_data[0]
        return replace(first, train_rows=pool([data.train_rows for data in self.setup.clients_data]), heldout_rows=())

    @cached_property
    def test_set(self) -> str:
        """The hash of the test split, its order and how much of it is used."""
        rows = self.setup.evaluation_rows
        hashes = b"".join(row_hashes(rows, self.setup.data.schema.columns))
        return sha256(hashes + str(self.setup.config.data.eval_limit).encode()).hexdigest()[:12]


def _every_other(rows: Rows, start: int) -> Rows:
    return take(rows, range(start, len(rows), 2))


def measure(config: Config, baseline: str, told: Told = lambda *_: None) -> dict[str, Any]:
    """Do one run, and return its record. Raises a `FedloraError` for a run that is refused.

    A run in which no client's training came to a number is `diverged`, and has no figures.
    """
    mute_transformers()
    began, cpu = time.monotonic(), time.process_time()
    prepared = _prepared(json.dumps(configuration.flatten(_shared_part(config))))
    setup = _setup_of(prepared.setup, config)
    with TemporaryDirectory() as folder:
        try:
            record = _RUNS[baseline](prepared, setup, Path(folder), told)
        except RoundFailed as e:
            record = {"error": str(e), "diverged": True}
    return {
        **record,
        "seconds": round(time.monotonic() - began, 1),
        "cpu": round(time.process_time() - cpu, 1),
    }


def _shared_part(config: Config) -> Config:
    """The settings on which model and rows rest, and no others."""
    unit = config.dp.unit if config.dp.by_record else "row"
    unlike_rows = PrivacyConfig(noise=1.0, unit=unit, metrics=True) if unit != "row" else PrivacyConfig()
    return Config(
        seed=config.seed,
        clients=config.clients,
        cohort=config.cohort,
        precision=config.precision,
        threads=config.threads,
        model=replace(config.model, head="shared"),
        lora=replace(config.lora, ranks=""),
        data=config.data,
        eval=config.eval,
        dp=unlike_rows,
    )


@lru_cache(maxsize=2)  # a line's seeds come one after another, and of a large model there is room for few
def _prepared(settings: str) -> Prepared:
    """The model and rows of runs with these settings, which are JSON of dotted keys."""
    return Prepared(prepare(configuration.build(json.loads(settings))))


def _setup_of(shared: RunSetup, config: Config) -> RunSetup:
    """The pieces of a run with these settings, of those that runs have in common."""
    resolved = resolve(config, shared.data.schema, len(shared.data.clients))
    memory = shared.model.memory
    dealt = ranks(
        config.lora.ranks,
        largest=config.lora.rank,
        clients=resolved.clients,
        seed=config.seed,
        memory=lambda rank: memory(rank, batch_size=config.train.batch_size),
    )
    check_training(shared.model, shared.start, resolved)
    return replace(shared, config=resolved, ranks=tuple(dealt))


def _federated(prepared: Prepared, setup: RunSetup, folder: Path, told: Told) -> dict[str, Any]:
    """A run of the strategy that the settings name."""
    config = setup.config
    strategy = compose(config, setup.start, setup.ranks)
    training = replace(setup, clients_data=_holding_out(setup.clients_data, prepared.halves["choice"]))
    fleet = on_clock(config, fleet_here(training, folder))
    plan = _plan(training, strategy, fleet)
    rounds = []
    for done in rounds_left(setup, strategy, fleet, plan):
        rounds.append(done)
        told(done.number, config.rounds)
    state = rounds[-1].state
    kept = kept_by_clients(strategy, setup.start, config.rounds)
    clients = fleet.clients()
    jobs = {c.id: replace(strategy.client_init(state, c), round=len(rounds) - 1) for c in clients}
    common = None if kept else strategy.adapter(state)
    return {
        **_scores(prepared, setup, jobs, folder, common),
        "personal": kept,
        **_course(rounds),
        **_privacy(plan, rounds, clients),
    }


def _plan(setup: RunSetup, strategy: Strategy[Any], fleet: Fleet) -> Plan:
    """The plan of the run, in which nothing is evaluated on the way that the strategy does not ask for."""
    config = setup.config
    measured = config.lora.kind == "lora" and not config.dp.by_client and not config.secure.aggregation
    plan = plan_of(replace(setup, config=replace(config, exactness=measured)), fleet)
    return replace(
        plan,
        evaluate=plan.evaluate if config.server.patience else None,
        evaluate_clients=plan.evaluate_clients and strategy.needs_senders,
        personal=PersonalConfig(),
    )


def _holding_out(clients_data: Sequence[ClientData], rows: Sequence[Rows]) -> tuple[ClientData, ...]:
    return tuple(replace(d, heldout_rows=held) for d, held in zip(clients_data, rows, strict=True))


def _alone(prepared: Prepared, setup: RunSetup, folder: Path, told: Told) -> dict[str, Any]:
    """Every client by itself, as long as in all rounds."""
    config = setup.config
    strategy = compose(config, setup.start, setup.ranks)
    fleet = fleet_here(setup, folder)
    plan = Plan(rounds=config.rounds, cohort=config.cohort, seed=config.seed, training=config.train)
    start = strategy.init(setup.start)
    jobs = {c.id: stage_job(strategy, start, c, plan, "alone", 0) for c in fleet.clients()}
    _, failed = answers_and_failures(jobs, dict(fleet.train(jobs)))
    if len(failed) == len(jobs):
        raise RoundFailed(f"no client could train by itself: {next(iter(failed.values()))}")
    told(1, 1)
    return {**_scores(prepared, setup, jobs, folder, None), "personal": ["every side"]}


def _pooled(prepared: Prepared, setup: RunSetup, folder: Path, told: Told) -> dict[str, Any]:
    """One model on the rows of all."""
    config = setup.config
    strategy = compose(config, setup.start)
    clients_data, training = (prepared.pooled,), pooled_training(config, len(setup.clients_data))
    fleet = fleet_here(replace(setup, clients_data=clients_data, ranks=setup.ranks[:1]), folder / "pooled")
    plan = Plan(rounds=1, cohort=1, seed=config.seed, training=training, policy=Policy(largest_step=1e30))
    state = [done.state for done in fit(strategy, fleet, setup.start, plan)][-1]
    told(1, 1)
    clients = (data.client(i, config.lora.rank) for i, data in enumerate(setup.clients_data))
    jobs = {c.id: strategy.client_init(state, c) for c in clients}
    return {**_scores(prepared, setup, jobs, folder, strategy.adapter(state)), "personal": []}


_RUNS: Mapping[str, Callable[[Prepared, RunSetup, Path, Told], dict[str, Any]]] = {
    "": _federated,
    "alone": _alone,
    "pooled": _pooled,
}


def _scores(prepared: Prepared, setup: RunSetup, jobs: Mapping[int, Job], folder: Path, common: Any) -> dict[str, Any]:
    """How good the clients' models are on what each holds out, and the common one, or all of theirs, on the test split.

    `jobs` are those by which a client's own model is found, `common` is the adapter of all, where there is one.
    """
    found: dict[str, Any] = {}
    for half in HALVES:
        tasks = _own_models(setup, jobs, folder, prepared.halves[half])
        metrics = dict(zip(jobs, evaluation.evaluate(setup.model, tasks), strict=True))
        found[half] = _over_clients(metrics)
    if len(setup.evaluation_rows):
        examples = prepared.setup.evaluation
        with setup.model.measuring(setup.config.eval.target_metric):
            found["test"] = _on_test(setup.model, examples, _models(setup, jobs, folder, common)) | {
                "set": prepared.test_set
            }
    return found


def _own_models(
    setup: RunSetup, jobs: Mapping[int, Job], folder: Path, rows: Sequence[Rows]
) -> Sequence[EvaluationTask]:
    """Each client's own model, with these rows as what it holds out."""
    clients_data = _holding_out(setup.clients_data, rows)
    clients = LocalClients(clients_data, setup.ranks, folder, policy_of(setup.config))
    return [*clients.own_models(jobs, PartTracker())]


def _models(setup: RunSetup, jobs: Mapping[int, Job], folder: Path, common: Any) -> list[Callable[[], object]]:
    """Functions each of which puts a model in place: the common one, or that of every client."""
    model = setup.model
    if common is not None:
        return [partial(model.set_adapter, common)]
    tasks = _own_models(setup, jobs, folder, [()] * len(setup.clients_data))
    return [partial(load_start, model, task.job, task.kept) for task in tasks]


def _over_clients(metrics: Mapping[int, Metrics]) -> dict[str, Any]:
    """Loss and headline metric over clients, and every client's own."""
    values = {i: m.values() for i, m in metrics.items() if m.targets}
    if not values:
        return {}
    name = str(spread(metrics)["metric"])
    loss = fmean(v["loss"] for v in values.values())
    return {
        "loss": loss if abs(loss) < float("inf") else None,
        **spread(metrics),
        "each": {str(i): round(v[name], 6) for i, v in values.items() if name in v},
    }


def _on_test(model: Model, examples: Sequence[Any], models: Sequence[Callable[[], object]]) -> dict[str, Any]:
    """The figures on the test split, the mean over models, and each example's, by which two runs are held together.

    An example's figure is the share of its targets that are met where accuracy is what is shown, else its loss.
    """
    found: list[dict[str, float]] = []
    sums = [0.0] * len(examples)
    by_accuracy = True
    for put in models:
        put()
        each = measure_each(model, [[example] for example in examples])
        found.append(reduce(add, each).values())
        by_accuracy = headline(found[-1])[0] == "accuracy"
        sums = [before + _figure(m, by_accuracy) for before, m in zip(sums, each, strict=True)]
    values = {name: fmean(v[name] for v in found) for name in found[0]}
    return {
        "values": values,
        "of": "accuracy" if by_accuracy else "loss",
        "examples": pack([total / len(models) for total in sums]),
    }


def _figure(metrics: Metrics, by_accuracy: bool) -> float:
    values = metrics.values()
    return values["accuracy"] if by_accuracy else values["loss"]


def _course(rounds: Sequence[RoundResult]) -> dict[str, Any]:
    """What the rounds were and cost, a list for each key."""
    columns: dict[str, list[Any]] = {
        "train_loss": [done.train_loss for done in rounds],
        "bytes_up": [done.bytes_up for done in rounds],
        "bytes_down": [done.bytes_down for done in rounds],
        "exactness": [done.exactness for done in rounds],
        "failed": [len(done.failed) for done in rounds],
    }
    return {"rounds": len(rounds), **{key: values for key, values in columns.items() if any(values)}}


def _privacy(plan: Plan, rounds: Sequence[RoundResult], clients: Sequence[Client]) -> dict[str, Any]:
    """What a private run spent, and the least and most noise of a client."""
    spent = rounds[-1].record().get("epsilon")
    if spent is None:
        return {}
    noise: list[float] = []
    if plan.record_level:
        trained = [c for c in clients if not plan.record_level.why_left_out(c)]
        noise = [plan.record_level.terms_for(c).noise for c in trained]
    elif plan.client_level:
        noise = [plan.client_level.noise]
    return {"epsilon": spent, "noise": [min(noise), max(noise)]}
