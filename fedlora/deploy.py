"""One party's part of a deployed run: the server, which has no clients' data, or a client, which has its own alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import config as configuration
from . import data
from .config import Config
from .errors import ClientFailed, ConfigError
from .folder import RunFolder
from .model import Model
from .run import Setup, assemble, localise, own, prepare, resolve
from .site import Own, Site

Plain = int | float | str | bool
# Settings that are paths on the server's disk: removed from what clients are sent, and ignored by a client if they come
# all the same.
AWAY = ("data.path", "data.eval", "lora.init_data", "dp.ledger")
ELSEWHERE = "local:"  # before the name of a base model that lies in a folder of the server's


@dataclass(frozen=True, eq=False)
class Party:
    """One client's pieces of a run: the model, its own examples and its rank."""

    model: Model
    site: Site
    rank: int


def for_server(config: Config, ids: int) -> Setup:
    """The server's pieces of a deployed run; `ids` is one more than the highest number of a client."""
    config = localise(replace(config, engine="flower"))
    embedded = not (config.model.path or config.data.path)  # the small model and text that come with fedlora
    rows = data.server(config.data, config.model.task, embedded)
    return assemble(resolve(config, rows.form, config.clients), rows, ids)


def again(folder: RunFolder, config: Config) -> Setup:
    """The pieces of the run in a folder; of a deployed run those of its server, which has no clients' data."""
    deployed = (folder.path / "flower" / "order.json").is_file()
    return for_server(config, config.clients) if deployed else prepare(config)


def told(config: Config) -> dict[str, Plain]:
    """The settings of a run that its clients are sent: all but where the server has its own files."""
    flat = {key: value for key, value in configuration.flatten(config).items() if not key.startswith("option.")}
    plain = {key: ", ".join(value) if isinstance(value, list) else value for key, value in flat.items()}
    changed = {"model.path": _model_name(config.model.path), "data.partition": "auto"}
    return plain | dict.fromkeys(AWAY, "") | changed


def _model_name(path: str) -> str:
    """A hub id as it is; of a folder its last name, marked as the server's own."""
    return f"{ELSEWHERE}{Path(path).name}" if path and Path(path).is_dir() else path


def for_client(settings: Mapping[str, Any], mine: Mapping[str, Any], id: int) -> Party:
    """One client's pieces of a deployed run, by the run's settings under those that are the client's own to choose.

    Raises `ConfigError`, `DataError` or `ModelError` for what the client itself has to mend.
    """
    config = localise(_merged(settings, mine))
    if id >= config.clients and not config.data.path:
        raise ClientFailed(f"client {id} has no share of the embedded data of {config.clients} clients; give it --data")
    rows = data.client(config.data, config.model.task, id, config.clients, config.seed)
    setup = assemble(config, rows, ids=max(id + 1, config.clients))
    return Party(setup.model, setup.sites[0], setup.ranks[id])


def insists(mine: Mapping[str, Any], ledgers: Path) -> Own:
    """What a client insists on, by its own settings alone; its ledgers outlive every run."""
    config = configuration.build(mine)
    where = Path(config.dp.ledger).expanduser() if config.dp.ledger else ledgers
    return replace(own(config), ledgers=where, seeded=config.dp.seeded)


def _merged(settings: Mapping[str, Any], mine: Mapping[str, Any]) -> Config:
    """The run's settings under the client's own; a path is the client's own or none."""
    known = {setting.key for setting in configuration.settings()} - {*AWAY}
    run = {key: value for key, value in settings.items() if key in known}
    if run.get("lora.init") in ("eva", "pissa", "olora"):  # the factors come with the job, whatever they are
        run["lora.init"] = "kaiming"
    return configuration.build(run, {key: value for key, value in mine.items() if _shapes_data(key)}, _base(run, mine))


def _shapes_data(key: str) -> bool:
    """Whether a client's own setting changes its model or data; the others say what it insists on (`insists`)."""
    return key == "dp.unit" or not key.startswith(("secure.", "client.", "dp."))


def _base(run: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, str]:
    """Where the base model is for this client: where it says itself, or the hub id of the run."""
    path = str(mine.get("model.path") or run.get("model.path", ""))
    if path.startswith(ELSEWHERE):
        raise ConfigError(
            f"the server has the base model in a folder of its own, {path.removeprefix(ELSEWHERE)}; give --model the "
            "folder of the same files here"
        )
    return {"model.path": path}
