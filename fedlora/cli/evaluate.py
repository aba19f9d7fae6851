"""`fedlora evaluate`: the metrics of a run's adapter beside those of its base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import takes_settings

if TYPE_CHECKING:
    from fedlora.lora import LoRA
    from fedlora.metrics import Metrics
    from fedlora.run.directory import RunDirectory
    from fedlora.run.setup import RunSetup
    from fedlora.strategy import Strategy


@takes_settings("eval_data", eval_data="other data than the run's own evaluation, written as data.path is")
def evaluate(
    given: dict[str, Any],
    folder: Annotated[Path, typer.Argument(help="A run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Evaluate the adapter that a run delivered, beside its base model."""
    import json

    from fedlora import config as configuration
    from fedlora.errors import CheckpointError, ConfigError
    from fedlora.metrics import spread
    from fedlora.models.peft_files import load_peft
    from fedlora.run.compose import compose
    from fedlora.run.console import figures, show_log
    from fedlora.run.directory import RunDirectory
    from fedlora.run.setup import mute_transformers, reopen

    show_log()
    run = RunDirectory(folder)
    config = configuration.build(run.config(), given)
    mute_transformers()
    setup = reopen(run, config)
    if not (run.adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} has no adapter yet; finish the run with fedlora simulate --resume {folder}")
    adapter = load_peft(setup.model, run.adapter)
    if not setup.evaluation:
        raise ConfigError("there is nothing to evaluate on: give --eval-data")
    strategy = compose(setup.config, setup.start, setup.ranks)
    first = strategy.adapter(strategy.init(setup.start))
    result: dict[str, Any] = {"before": _measured(setup, first), "after": _measured(setup, adapter)}
    clients = _clients(setup, strategy, run)
    if clients:
        result["clients"] = spread(clients)
    if as_json:
        print(json.dumps(result))
        return
    for name, values in result.items():
        print(f"{name + ':':9}{figures(values)}")


def _measured(setup: "RunSetup", adapter: "LoRA") -> dict[str, float]:
    """The figures of the model with this adapter on the held-out set, and of its answers where it gives them."""
    from fedlora.run.answers import means

    generated = means(setup.answers.answers(adapter)) if setup.answers else {}
    return setup.evaluate(adapter).values() | generated


def _clients(setup: "RunSetup", strategy: "Strategy[Any]", run: "RunDirectory") -> Mapping[int, "Metrics"]:
    """Each client's own model, with what it keeps, on its own held-out examples; none where it has none."""
    from dataclasses import replace

    from fedlora.server.rounds import answers_and_failures
    from fedlora.simulations.serial import Serial
    from fedlora.storage import checkpoint

    last = checkpoint.latest(run.checkpoints)
    able = [id for id, client_data in enumerate(setup.clients_data) if len(client_data.heldout)]
    if last is None or not able:
        return {}
    fleet = Serial(setup.model, setup.clients_data, setup.ranks, run.clients)
    clients = [client for client in fleet.clients() if client.id in able]
    jobs = {client.id: replace(strategy.client_init(last.state, client), round=last.round) for client in clients}
    return answers_and_failures(jobs, fleet.evaluate(jobs))[0]
