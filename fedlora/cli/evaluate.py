"""`fedlora evaluate`: the metrics of a run's adapter beside those of its base model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import takes_settings

TASKS = "Public benchmarks (lm-eval)"

if TYPE_CHECKING:
    from fedlora.jobs import Job
    from fedlora.lora import LoRA
    from fedlora.metrics import Metrics
    from fedlora.run.directory import RunDirectory
    from fedlora.run.harness import Scores
    from fedlora.run.setup import RunSetup
    from fedlora.strategy import Strategy


@takes_settings("eval_data", eval_data="other data than the run's own evaluation, written as data.path is")
def evaluate(
    given: dict[str, Any],
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, with commas between: gsm8k,arc_easy.", rich_help_panel=TASKS)
    ] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of a task; default all.", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before a question.", rich_help_panel=TASKS)
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option("--apply-chat-template", help="Ask through the model's chat template.", rich_help_panel=TASKS),
    ] = False,
) -> None:
    """Evaluate the adapter that a run delivered, beside its base model."""
    from fedlora.errors import ConfigError
    from fedlora.run.compose import compose
    from fedlora.run.console import show_log
    from fedlora.run.directory import RunDirectory
    from fedlora.run.harness import HarnessTasks, harness

    show_log()
    how: dict[str, Any] = {
        "include_path": include_path,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template or None,
    }
    _refuse_without_tasks(tasks, how)
    run = RunDirectory(folder)
    setup, adapter = _reopened(run, given)
    if not (setup.evaluation or tasks):
        raise ConfigError("there is nothing to evaluate on: give --eval-data")
    names = [name for name in tasks.split(",") if name]
    chosen = HarnessTasks(names, batch_size=setup.config.eval.batch_size, **how)
    benchmark = harness(setup.model, chosen) if tasks else None  # what is wrong with it is said first
    strategy = compose(setup.config, setup.start, setup.ranks)
    first = strategy.adapter(strategy.init(setup.start))
    result = _held_out(setup, strategy, run, {"before": first, "after": adapter})
    public = {"before": benchmark(first), "after": benchmark(adapter)} if benchmark else {}
    print(_as_json(result, public) if as_json else "\n".join([*_figure_lines(result), *_task_lines(public)]))


def _refuse_without_tasks(tasks: str, how: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an option that says how tasks are done where there are none."""
    from fedlora.errors import ConfigError

    named = [f"--{name.replace('_', '-')}" for name, value in how.items() if value is not None]
    if named and not tasks:
        raise ConfigError(f"{named[0]} says how tasks of lm-eval are done, and none is named; add --tasks, or drop it")


def _reopened(run: "RunDirectory", given: Mapping[str, Any]) -> tuple["RunSetup", "LoRA"]:
    """The pieces of the run, and the adapter that it delivered. Raises `CheckpointError` where it has none yet."""
    from fedlora import config as configuration
    from fedlora.errors import CheckpointError
    from fedlora.models.peft_files import load_peft
    from fedlora.run.setup import mute_transformers, reopen

    config = configuration.build(run.config(), given)
    mute_transformers()
    setup = reopen(run, config)
    if not (run.adapter / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{run.path} has no adapter yet; finish the run with fedlora simulate --resume {run.path}"
        )
    return setup, load_peft(setup.model, run.adapter)


def _held_out(
    setup: "RunSetup", strategy: "Strategy[Any]", run: "RunDirectory", adapters: Mapping[str, "LoRA"]
) -> dict[str, Any]:
    """The figures of every adapter on the held-out set, and the clients' own on theirs; none where there are none."""
    from fedlora.metrics import spread

    result: dict[str, Any] = {}
    if setup.evaluation:
        result |= {name: _measured(setup, adapter) for name, adapter in adapters.items()}
    jobs = _jobs(setup, strategy, run)
    clients = _clients(setup, run, {i: job for i, job in jobs.items() if len(setup.clients_data[i].heldout)})
    result |= {"clients": spread(clients), "each": _each(clients)} if clients else {}
    result |= _after_stages(setup, run, jobs)
    return result | _own_answers(setup, strategy, run, jobs)


def _each(clients: Mapping[int, "Metrics"]) -> dict[str, dict[str, float]]:
    """Each client's own figures, by its number, and on how many examples they are."""
    scored = {i: metrics for i, metrics in clients.items() if metrics.targets}
    return {str(i): {"heldout": metrics.examples, **metrics.values()} for i, metrics in scored.items()}


def _as_json(result: Mapping[str, Any], public: Mapping[str, "Scores"]) -> str:
    import json

    return json.dumps({**result, "tasks": public} if public else result)


def _figure_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for the figures of every model."""
    from fedlora.run.console import figures

    yield from (f"{name + ':':9}{figures(values)}" for name, values in result.items() if name != "each")
    for client, values in result.get("each", {}).items():
        yield f"client {client + ':':6} {figures(values)}"


def _task_lines(public: Mapping[str, "Scores"]) -> Iterator[str]:
    """Yield a line for every score of every task, before and after."""
    for task, values in public.get("before", {}).items():
        for name, before in values.items():
            yield f"{task} {name}: {before:.4g} before, {public['after'][task][name]:.4g} after"


def _measured(setup: "RunSetup", adapter: "LoRA") -> dict[str, float]:
    """The figures of the model with this adapter on the held-out set, and of its answers where it gives them."""
    from fedlora.run.answers import means

    generated = means(setup.answers.answers(adapter)) if setup.answers else {}
    return setup.evaluate(adapter).values() | generated


def _jobs(setup: "RunSetup", strategy: "Strategy[Any]", run: "RunDirectory") -> dict[int, "Job"]:
    """Every client's job after the last round, by which its own model is found; none before the first."""
    from dataclasses import replace

    from fedlora.storage import checkpoint

    last = checkpoint.latest(run.checkpoints)
    if last is None:
        return {}
    clients = (data.client(i, setup.ranks[i]) for i, data in enumerate(setup.clients_data))
    return {c.id: replace(strategy.client_init(last.state, c), round=last.round - 1) for c in clients}


def _clients(setup: "RunSetup", run: "RunDirectory", jobs: Mapping[int, "Job"]) -> Mapping[int, "Metrics"]:
    """Each of these clients' own model, with what it keeps, on its own held-out examples."""
    from fedlora.server.rounds import answers_and_failures
    from fedlora.simulations.serial import Serial

    if not jobs:
        return {}
    fleet = Serial(setup.model, setup.clients_data, setup.ranks, run.clients)
    return answers_and_failures(jobs, fleet.evaluate(jobs))[0]


def _after_stages(setup: "RunSetup", run: "RunDirectory", jobs: Mapping[int, "Job"]) -> dict[str, Any]:
    """The clients' own on theirs, of the models that each came to by itself after the rounds; none where none did."""
    from dataclasses import replace

    from fedlora.message_types import Stage
    from fedlora.metrics import spread
    from fedlora.storage.client_state import ClientState

    result: dict[str, Any] = {}
    stages: tuple[Stage, ...] = ("personal", "alone")
    for stage in stages:
        has = {i: ClientState(run.clients / str(i), stage).of(job.round) for i, job in jobs.items()}
        own = {i: replace(job, stage=stage) for i, job in jobs.items() if has[i] and setup.clients_data[i].heldout}
        result |= {stage: spread(_clients(setup, run, own))} if own else {}
    return result


def _own_answers(
    setup: "RunSetup", strategy: "Strategy[Any]", run: "RunDirectory", jobs: Mapping[int, "Job"]
) -> dict[str, Any]:
    """The scores of what the clients' own models answer, each to its share of the prompts, where none is common."""
    from fedlora.run.answers import means
    from fedlora.run.sides import kept_by_clients
    from fedlora.simulations.serial import own_answers

    if not setup.answers or not jobs or not kept_by_clients(strategy, setup.start, setup.config.rounds):
        return {}
    return {"own": means(own_answers(setup.answers, jobs, run.clients))}
