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
AWAY = ("data.path", "data.eval", "lora.init_data", "dp.ledger")  # of the server's disk: not told, and not believed
ELSEWHERE = "local:"  # before the name of a base model that lies in a folder of the server's


@dataclass(frozen=True, eq=False)
class Party:
    """What one client's process has, whatever the run."""

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
    """The pieces of a run that lies in a folder: of a deployed one, without the clients' data."""
    deployed = (folder.path / "flower" / "order.json").is_file()
    return for_server(config, config.clients) if deployed else prepare(config)


def told(config: Config) -> dict[str, Plain]:
    """What clients are told of a run's settings: all but where the server has its own files."""
    flat = configuration.flatten(config)
    plain = {k: ", ".join(v) if isinstance(v, list) else v for k, v in flat.items() if not k.startswith("option.")}
    path = config.model.path
    model = f"{ELSEWHERE}{Path(path).name}" if Path(path).is_dir() and path else path
    return plain | dict.fromkeys(AWAY, "") | {"model.path": model, "data.partition": "auto"}


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
    """The run's settings under the client's own; what is private to either disk is the client's or nothing."""
    known = {s.key for s in configuration.settings()}
    run = {k: v for k, v in settings.items() if k in known and k not in AWAY}
    over = {k: v for k, v in mine.items() if not k.startswith(("secure.", "client.", "dp.")) or k == "dp.unit"}
    path = str(mine.get("model.path") or run.get("model.path", ""))
    if path.startswith(ELSEWHERE):
        raise ConfigError(
            f"the server has the base model in a folder of its own, {path.removeprefix(ELSEWHERE)}; give --model the "
            "folder of the same files here"
        )
    if run.get("lora.init") in ("eva", "pissa", "olora"):  # the factors come with the job, whatever they are
        run["lora.init"] = "kaiming"
    return configuration.build(run, over, {"model.path": path})
