"""`fedlora evaluate`: the metrics of a run's adapter beside those of its base model."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.errors import CheckpointError, ConfigError
from fedlora.metrics import Metrics, spread
from fedlora.models.peft_files import load_peft
from fedlora.run.compose import compose
from fedlora.run.console import figures
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import RunSetup, quiet_libraries, reopen
from fedlora.server.rounds import answers_and_failures
from fedlora.storage import checkpoint
from fedlora.strategy import Strategy


def evaluate(path: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Print how good the delivered adapter is, beside the base model that the run started from."""
    folder = RunDirectory(path)
    config = configuration.build(folder.config(), given)
    quiet_libraries()
    setup = reopen(folder, config)
    if not (folder.adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} has no adapter yet; finish the run with fedlora simulate --resume {path}")
    adapter = load_peft(setup.model, folder.adapter)
    if not setup.evaluation:
        raise ConfigError("there is nothing to evaluate on: give --eval-data")
    strategy = compose(setup.config, setup.start, setup.ranks)
    first = strategy.adapter(strategy.init(setup.start))
    result: dict[str, Any] = {"before": setup.evaluate(first).values(), "after": setup.evaluate(adapter).values()}
    clients = _clients(setup, strategy, folder)
    if clients:
        result["clients"] = spread(clients)
    if as_json:
        print(json.dumps(result))
        return
    for name, values in result.items():
        print(f"{name + ':':9}{figures(values)}")


def _clients(setup: RunSetup, strategy: Strategy[Any], folder: RunDirectory) -> Mapping[int, Metrics]:
    """Each client's own model, with what it keeps, on its own held-out examples; none where it has none."""
    from fedlora.simulations.serial import Serial

    last = checkpoint.latest(folder.checkpoints)
    able = [id for id, client_data in enumerate(setup.clients_data) if len(client_data.heldout)]
    if last is None or not able:
        return {}
    fleet = Serial(setup.model, setup.clients_data, setup.ranks, folder.clients)
    clients = [client for client in fleet.clients() if client.id in able]
    jobs = {client.id: replace(strategy.client_init(last.state, client), round=last.round) for client in clients}
    return answers_and_failures(jobs, fleet.evaluate(jobs))[0]
