"""A run put together from its config: the same pieces in every process, whatever fleet carries the clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from . import data, preflight, promise, report
from .central import Central
from .checkpoint import again
from .compose import compose
from .config import Config, absolute
from .data import Form
from .errors import CheckpointError, ConfigError, Failure, PrivacyError
from .folder import RunFolder
from .lora import LoRA
from .metrics import Metrics
from .model import Model, save_peft
from .privacy import central, terms
from .ranks import ranks
from .rounds import Fleet, Plan, fit
from .secure import FEWEST
from .site import Own, Site
from .strategy import Strategy


@dataclass(eq=False)
class Setup:
    """What a process needs to play server and any client: made from the config alone, alike everywhere."""

    config: Config  # resolved: counts and labels as they are, paths absolute
    model: Model
    start: LoRA  # the adapter as PEFT made it
    sites: tuple[Site, ...]
    ranks: tuple[int, ...]  # of each client
    evaluation_rows: data.Rows

    @cached_property
    def evaluation(self) -> list[dict[str, torch.Tensor]]:
        examples = self.model.encoder(self.evaluation_rows)
        limit = self.config.data.eval_limit or len(examples)
        return examples[:: max(1, ceil(len(examples) / max(limit, 1)))]

    def evaluate(self, lora: LoRA) -> Metrics:
        """The global model on the global held-out set."""
        self.model.write(lora)
        return self.model.metrics(self.evaluation)


class Show(Protocol):
    """Whoever watches a run."""

    def started(
        self, setup: Setup, strategy: Strategy[Any], before: Mapping[str, float], done: int, promise: Sequence[str]
    ) -> None: ...
    def answered(self, client: int) -> None: ...
    def waiting(self, clients: Mapping[int, float]) -> None: ...
    def round(self, record: Mapping[str, Any], failed: Mapping[int, Failure]) -> None: ...
    def finished(self, folder: RunFolder, stopped: bool) -> None: ...


def prepare(config: Config) -> Setup:
    """The pieces of a simulated run: the server's and every client's. The config comes back with nothing left open."""
    config = localise(config)
    rows = data.load(config.data, config.model.task, config.clients, config.seed)
    config = resolve(config, rows.form, len(rows.clients))
    return assemble(config, rows, ids=config.clients)


def localise(config: Config) -> Config:
    """The config with absolute paths, in a process that computes on as many threads as it says."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return absolute(config)


def assemble(config: Config, rows: data.Federated, ids: int) -> Setup:
    """The pieces that one side of a run makes of its rows: the model, each client's examples, every client's rank.

    `ids` is one more than the highest number of a client; each number below it has a rank.
    """
    public = data.public(config.lora.init_data, rows.form)
    model = Model(config.model, config.lora, rows.form, config.seed, public)
    heldout = rows.heldout or ((),) * len(rows.clients)
    unit = config.dp.unit if config.dp.by_record else "row"  # to count examples is to encode them
    shares = zip(rows.clients, heldout, strict=True)
    sites = tuple(Site(model.encoder, train, held, unit) for train, held in shares)
    memory = partial(model.memory, batch_size=config.train.batch_size)
    dealt = ranks(config.lora.ranks, largest=config.lora.rank, clients=ids, seed=config.seed, memory=memory)
    return Setup(config, model, model.read(), sites, tuple(dealt), rows.evaluation)


def drive(setup: Setup, fleet: Fleet, folder: RunFolder, show: Show) -> None:
    """Run the rounds that are left, keeping each; then write the adapter."""
    config = setup.config
    strategy = compose(config, setup.start, setup.ranks)
    past = folder.past()
    records = folder.records()
    plan = Plan(
        rounds=config.rounds,
        cohort=config.cohort,
        seed=config.seed,
        training=config.train,
        policy=config.server,
        evaluate=setup.evaluate if len(setup.evaluation_rows) else None,
        evaluate_clients=config.data.holdout > 0,
        exactness=_measured(setup) if config.exactness else None,
        metrics=not config.dp.on or config.dp.metrics,
        terms=terms(config.dp, config.train, config.rounds, fleet.clients()) if config.dp.by_record else None,
        central=_central(setup) if config.dp.by_client else None,
        secure=config.secure if config.secure.aggregation else None,
        messages=config.messages,
    )
    state = past.state if past else strategy.init(setup.start)
    promised = _promise(setup, plan, strategy, state, fleet) if config.dp.on or plan.secure else {}
    before = records[0].get("before", {}) if records else _before(plan, strategy.adapter(state))
    show.started(setup, strategy, before, past.rounds if past else 0, promise.lines(promised) if promised else ())
    try:
        for done in fit(strategy, fleet, setup.start, plan, past):
            state = done.state
            record = done.record() | ({"before": before} if done.number == 1 else {})
            folder.save(done, record)
            if promised:
                report.write(folder, promised)
            show.round(record, done.failed)
    finally:
        if folder.records():
            _deliver(setup.model, strategy.adapter(state), folder)
        folder.close()
    show.finished(folder, stopped=len(folder.records()) < config.rounds)


def _promise(setup: Setup, plan: Plan, strategy: Strategy[Any], state: Any, fleet: Fleet) -> dict[str, Any]:
    """The facts of the run's privacy; where records are hidden, the model is looked at first, and may be refused."""
    clients = fleet.clients()
    job, findings = strategy.client_init(state, clients[0]), None
    if plan.terms:
        job = replace(job, privacy=plan.terms.of(clients[0]))
        findings = preflight.once(setup.model, job)
    return promise.facts(setup.config, plan, clients, job, findings)


def _deliver(model: Model, adapter: LoRA, folder: RunFolder) -> None:
    try:
        save_peft(model, adapter, folder.adapter)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder.adapter} could not be written: {e}; the rounds are in the checkpoint: "
            f"make room, then {again(folder.path)}"
        ) from e


def _measured(setup: Setup) -> Mapping[str, float]:
    """Every module's s, for the exactness meter."""
    if setup.config.lora.kind != "lora":
        raise ConfigError(
            f"exactness is not defined for lora.kind = {setup.config.lora.kind}: its model is no sum of weights and "
            "a product; leave exactness out"
        )
    return setup.model.scales


def own(config: Config) -> Own:
    """What clients with these settings insist on."""
    dp, metrics = config.dp, not config.dp.on or config.dp.metrics
    folder = Path(dp.ledger) if dp.ledger else None
    seeded, masked = not dp.on or dp.seeded, config.secure.aggregation
    return Own(folder, dp.limit, dp.by_record, seeded, metrics, masked, config.client.egress)


def _central(setup: Setup) -> Central:
    config = setup.config
    return central(config.dp, config.cohort, config.clients, config.rounds, config.seed)


def _before(plan: Plan, adapter: LoRA) -> dict[str, float]:
    return plan.evaluate(adapter).values() if plan.evaluate else {}


def resolve(config: Config, form: Form, clients: int) -> Config:
    """The settings with counts and labels as they are. Raises `ConfigError` or `PrivacyError` where they contradict."""
    cohort = _cohort(config, clients)
    if config.engine == "stacked":
        raise ConfigError('engine = "stacked" is not in this version; choose "serial" or "flower"')
    if config.dp.on:
        _refuse_what_is_not_private(config)
    if config.secure.aggregation:
        _refuse_what_cannot_be_hidden(config, cohort=cohort, clients=clients)
    return replace(
        config,
        clients=clients,
        cohort=cohort,
        engine="serial" if config.engine == "auto" else config.engine,
        data=replace(config.data, labels=form.labels),
    )


def _cohort(config: Config, clients: int) -> int:
    """How many clients are asked in a round: as many as the settings say, or a fifth of all."""
    if config.cohort > clients:
        raise ConfigError(
            f"cohort = {config.cohort} is more than the {clients} clients there are; choose {clients} or fewer"
        )
    fewest = FEWEST if config.secure.aggregation else 2
    return config.cohort or min(max(fewest, clients // 5), clients)


def _refuse_what_cannot_be_hidden(config: Config, cohort: int, clients: int) -> None:
    """Raise `PrivacyError` for what secure aggregation leaves no room for."""
    if cohort < FEWEST:
        raise PrivacyError(
            f"secure.aggregation hides a client among {FEWEST} or more, and {cohort} of {clients} would "
            "be in a round; raise cohort, or have more clients"
        )
    if config.exactness:
        raise PrivacyError("exactness needs every client's update, which secure.aggregation hides; leave it out")


def _refuse_what_is_not_private(config: Config) -> None:
    """Raise `PrivacyError` for what would leave a client with no noise on it."""
    if config.data.holdout and not config.dp.metrics:
        raise PrivacyError(
            f"data.holdout = {config.data.holdout:g} lets clients tell scores on their own data, with no noise on "
            "them; leave it out, or say dp.metrics = true"
        )
    if config.exactness and config.dp.by_client:
        raise PrivacyError("exactness needs every client's update, which dp.level = client hides; leave it out")
