"""One run on the server's side: its plan from the config, the rounds that are left, the adapter at the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from math import ceil, isfinite
from types import MappingProxyType
from typing import Any, Protocol, cast

from safetensors import SafetensorError

from fedlora.errors import CheckpointError, ConfigError, Failure, ModelError, StopRun
from fedlora.jobs import Charge, Client
from fedlora.lora import LoRA
from fedlora.models.peft_files import check_loads, save_peft
from fedlora.models.probe import not_finite
from fedlora.privacy import preflight
from fedlora.privacy.client_level import ClientLevelDP, client_level_dp
from fedlora.privacy.record_level import record_level_dp
from fedlora.report.page import keep_report
from fedlora.run import answers, privacy_report, privacy_statement
from fedlora.run.asynchronous import buffer_of
from fedlora.run.compose import compose
from fedlora.run.console import so_far
from fedlora.run.delivery import check_adapter
from fedlora.run.directory import RunDirectory
from fedlora.run.model_card import card_facts, write_card
from fedlora.run.plan import Plan, ResumePoint, RoundResult
from fedlora.run.preview import Preview
from fedlora.run.setup import RunSetup
from fedlora.run.sides import kept_by_clients
from fedlora.server.asynchronous import ArrivalFleet, fit_asynchronously
from fedlora.server.personal import personalise
from fedlora.server.rounds import Fleet, evaluation, fit
from fedlora.storage.checkpoint import resume_hint
from fedlora.strategy import Strategy


class RunObserver(Protocol):
    """What is told of a run as it goes on, to show or to count it."""

    def previewed(self, preview: Preview) -> None:
        """What the run is about to do is known; it has trained and evaluated nothing yet."""

    def started(
        self, setup: RunSetup, strategy: Strategy[Any], before: Mapping[str, float], done: int, statement: Sequence[str]
    ) -> None:
        """The run begins, or goes on after `done` rounds; `before` is the evaluation of what it started from."""

    def joined(self, client: Client) -> None:
        """A client on another machine has said who it is."""

    def begins_without(self, missing: Sequence[int]) -> None:
        """The first round is near, and these clients on other machines are not there."""

    def answered(self, client: int) -> None:
        """A client's answer of this round has come."""

    def waiting(self, clients: Mapping[int, float]) -> None:
        """These clients have not answered; each has had so many seconds."""

    def round(self, record: Mapping[str, Any], failed: Mapping[int, Failure]) -> None:
        """A round is over, and kept; `record` is its line in rounds.jsonl."""

    def finished(self, folder: RunDirectory, stopped: bool) -> None:
        """The adapter is written; `stopped` early, or after the last round."""


def run_rounds(
    setup: RunSetup,
    fleet: Fleet,
    folder: RunDirectory,
    observer: RunObserver,
    names: Mapping[int, str] = MappingProxyType({}),
    charged: Mapping[int, Sequence[Charge]] = MappingProxyType({}),
    on_round: Callable[[Mapping[str, Any]], object] | None = None,
) -> None:
    """Run the rounds that are left, keeping each; then write the adapter.

    A round's record has the `names` of the clients that were asked, where they have names. `charged` are the charges in
    the ledgers of clients, where they lie on this machine. `on_round` is called with the record of each round that is
    over and kept; the run ends where it raises `StopRun`. Raises `PrivacyError` before the first round where these
    leave too few clients for one.
    """
    strategy = compose(setup.config, setup.start, setup.ranks)
    check_loads(setup.model)
    past = folder.resume_point()
    folder.keep_preview(setup.preview.record())
    observer.previewed(setup.preview)
    plan = replace(plan_of(setup, fleet), generate=_generation(setup, strategy, folder))
    state = past.state if past else strategy.init(setup.start)
    ledgers = ledgers_of(plan, fleet.clients(), charged, past.joined if past else {})
    statement = privacy_of(setup, plan, strategy, state, fleet, ledgers)
    before = _before(setup, plan, strategy.adapter(state), folder)
    lines = privacy_statement.summary_lines(statement) if statement else []
    lines += filter(None, [so_far(folder.records())])
    begun = past.rounds if past else 0
    observer.started(setup, strategy, before, begun, lines)
    try:
        if begun < plan.rounds:
            fleet.clients()  # waits until enough are there, which is no part of the first round's time
        for done in rounds_left(setup, strategy, fleet, plan, past):
            state = done.state
            record = done.record() | _first(before, done.number) | _names(names, done.asked)
            folder.save(done, record)
            if statement:
                privacy_report.write(folder, statement)
            observer.round(record, done.failed)
            if _ends_run(on_round, record):
                break
    finally:
        if folder.records():
            _deliver(setup, strategy, strategy.adapter(state), folder)
            keep_report(folder.path)  # of a run that fails here too, with the reasons
        folder.close()
    try:
        check_adapter(setup, strategy.adapter(state), folder)
        _personalise(strategy, state, fleet, setup.start, plan, folder)
        keep_report(folder.path)
    finally:
        observer.finished(folder, stopped=len(folder.records()) < plan.rounds)


def _ends_run(on_round: Callable[[Mapping[str, Any]], object] | None, record: Mapping[str, Any]) -> bool:
    """Call the caller's function of each round, if there is one; does it end the run?"""
    if on_round is None:
        return False
    try:
        on_round(deepcopy(record))  # what it does to it stays its own
    except StopRun:
        return True
    return False


def rounds_left(
    setup: RunSetup, strategy: Strategy[Any], fleet: Fleet, plan: Plan, past: ResumePoint | None = None
) -> Iterator[RoundResult]:
    """The rounds that are left, by the mode that the settings say."""
    if setup.config.server.mode == "async":
        return fit_asynchronously(strategy, cast(ArrivalFleet, fleet), setup.start, plan, past)
    return fit(strategy, fleet, setup.start, plan, past)


def _personalise(
    strategy: Strategy[Any], state: Any, fleet: Fleet, start: LoRA, plan: Plan, folder: RunDirectory
) -> None:
    """Have clients do for their own use what the run says, unless they have since the last round."""
    rounds = len(folder.records())
    if plan.personal.on and not folder.has_stages(plan.personal, rounds):
        folder.keep_stages(personalise(strategy, state, fleet, start, plan, rounds))


def _first(before: Mapping[str, float], number: int) -> dict[str, Mapping[str, float]]:
    """The key of the first round's record with the evaluation before it; nothing in the others."""
    return {"before": before} if number == 1 else {}


def _names(names: Mapping[int, str], asked: Sequence[int]) -> dict[str, dict[str, str]]:
    """The key of a round's record with the names of these clients; nothing where they have none."""
    return {"names": {str(i): names[i] for i in asked if i in names}} if names else {}


def plan_of(setup: RunSetup, fleet: Fleet) -> Plan:
    """What the rounds are to do, by the run's settings, but for answers that the model would write."""
    config = setup.config
    return Plan(
        rounds=config.rounds,
        cohort=config.cohort,
        seed=config.seed,
        training=config.train,
        policy=config.server,
        buffer=buffer_of(config),
        evaluate=setup.evaluate if len(setup.evaluation_rows) else None,
        generate_every=config.eval.every,
        evaluate_clients=config.data.holdout > 0,
        exactness=_measured(setup) if config.exactness else None,
        metrics=not config.dp.on or config.dp.metrics,
        record_level=record_level_dp(config.dp, config.train, config.rounds, fleet.clients())
        if config.dp.by_record
        else None,
        client_level=_client_level(setup) if config.dp.by_client else None,
        secure=config.secure if config.secure.aggregation else None,
        messages=config.messages,
        personal=config.personal,
    )


def _generation(
    setup: RunSetup, strategy: Strategy[Any], folder: RunDirectory
) -> Callable[[LoRA, int], Mapping[str, float]] | None:
    """A function that has held-out prompts answered, keeps the answers, and returns their scores; none without any.

    Raises `ConfigError` where clients have no common model that could answer.
    """
    chosen = setup.answers
    if chosen is None:
        return None
    if kept := kept_by_clients(strategy, setup.start, setup.config.rounds):
        raise ConfigError(
            f"eval.generate asks a common model, and there is none where clients keep {', '.join(kept)} to themselves: "
            f"leave it out, and after the run have each client's own answer: fedlora evaluate {folder.path} "
            "--eval.generate"
        )

    def generated(adapter: LoRA, rounds: int) -> Mapping[str, float]:
        scored = chosen.answers(adapter)
        answers.keep(folder.answers / f"round-{rounds:04}.jsonl", scored)
        return answers.means(scored)

    return generated


def privacy_of(
    setup: RunSetup, plan: Plan, strategy: Strategy[Any], state: Any, fleet: Fleet, ledgers: Mapping[str, float]
) -> dict[str, Any]:
    """The facts of the run's privacy; none without any. Where records are hidden, the model is checked first."""
    if not setup.config.dp.on and not plan.secure:
        return {}
    clients, dp, findings = fleet.clients(), plan.record_level, None
    trained = [c for c in clients if not dp.why_left_out(c)] if dp else clients
    job = strategy.client_init(state, trained[0])
    if dp:
        job = replace(job, privacy=dp.terms_for(trained[0]))
        findings = preflight.check_once(setup.model, job)
    return privacy_statement.privacy_facts(setup.config, plan, trained, job, findings, ledgers)


def ledgers_of(
    plan: Plan, clients: Sequence[Client], charged: Mapping[int, Sequence[Charge]], joined: Mapping[int, int]
) -> Mapping[str, float]:
    """What ledgers hold besides this run. Raises `PrivacyError` where they leave too few clients for a round."""
    dp = plan.record_level
    if not (dp and charged):
        return {}
    clients = [client for client in clients if not dp.why_left_out(client)]
    needed = max(1, ceil(plan.policy.quorum * plan.cohort)) if plan.policy.below_quorum == "stop" else 1
    privacy_statement.refuse_spent_budgets(dp, clients, charged, needed)
    return privacy_statement.ledger_facts(dp, clients, charged, joined)


def _deliver(setup: RunSetup, strategy: Strategy[Any], adapter: LoRA, folder: RunDirectory) -> None:
    """Write the adapter as PEFT's files, with its card; raise `CheckpointError` where there is no room for them."""
    try:
        folder.adapter_check.unlink(missing_ok=True)  # it was about the adapter before
        save_peft(setup.model, adapter, folder.adapter)
        write_card(card_facts(setup, strategy, folder), folder.adapter)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder.adapter} could not be written: {e}; the rounds are in the checkpoint: "
            f"make room, then {resume_hint(folder.path)}"
        ) from e


def _measured(setup: RunSetup) -> Mapping[str, float]:
    """Every module's s, for the exactness meter."""
    if setup.config.lora.kind != "lora":
        raise ConfigError(
            f"exactness is not defined for lora.kind = {setup.config.lora.kind}: its model is no sum of weights and "
            "a product; leave exactness out"
        )
    return setup.model.scales


def _client_level(setup: RunSetup) -> ClientLevelDP:
    """The mechanism that hides every client in a noised sum."""
    config = setup.config
    return client_level_dp(
        config.dp,
        cohort=config.cohort,
        clients=config.clients,
        rounds=config.rounds,
        seed=config.seed,
        secure=config.secure.aggregation,
    )


def _before(setup: RunSetup, plan: Plan, adapter: LoRA, folder: RunDirectory) -> dict[str, float]:
    """The evaluation before the first round: as the first round's record has it, or made now.

    Raises `ModelError` where a base that was not trained yet gives no numbers.
    """
    records = folder.records()
    if records:
        before: dict[str, float] = records[0].get("before", {})
        return before
    values = evaluation(plan, adapter, 0)
    if not isfinite(values.get("loss", 0.0)):
        raise ModelError(not_finite(setup.model.net, setup.config.model.dtype))
    return values
