"""`fedlora client` and `fedlora worker`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.errors import ConfigError, FedloraError

from .options import check_credentials, takes_settings

MODEL = "folder of the base model here, where the server's is one of its own"
Credentials = Annotated[Path | None, typer.Option(help="This client's folder of fedlora provision.")]
ClientId = Annotated[int | None, typer.Option(min=0, help="This client's number, without keys.")]
OwnConfig = Annotated[Path | None, typer.Option(help="TOML file with settings of its own.")]


@takes_settings(
    "data", "model", data="file or folder of its own data; none: its share of the embedded ones", model=MODEL
)
def client(
    given: dict[str, Any],
    state: Annotated[Path, typer.Option(help="Folder for what this client keeps, for all runs and for ever.")],
    server: Annotated[str, typer.Option(help="HOST or HOST:PORT; default: as its keys have it.")] = "",
    credentials: Credentials = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no key: for trials alone.")] = False,
    id: ClientId = None,
    config: OwnConfig = None,
    worker: Annotated[Path | None, typer.Option(help="Socket of a fedlora worker that is started elsewhere.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Load the model for every message: slow, but small between.")
    ] = False,
) -> None:
    """Take part in runs of a server; a client's settings are where its data are, and what it insists on."""
    check_credentials(credentials, insecure, "client")
    from fedlora.client.deployment.supervisor import client_options, serve

    options = client_options(server, credentials, state, id, own_settings(config, given))
    serve(replace(options, worker=worker, cold=cold))


@takes_settings("data", "model", data="file or folder of its own data", model=MODEL)
def worker(
    given: dict[str, Any],
    socket: Annotated[Path, typer.Option(help="Unix socket to serve on.")],
    state: Annotated[Path | None, typer.Option(help="Folder for what this client keeps.")] = None,
    credentials: Credentials = None,
    id: ClientId = None,
    config: OwnConfig = None,
    told: Annotated[Path | None, typer.Option(help="File with all of this, from fedlora client.", hidden=True)] = None,
) -> None:
    """Hold a client's model, data and state, and do jobs over a Unix socket; `fedlora client` starts one itself."""
    if told:
        words = json.loads(told.read_text())
        settings, id, state = words["settings"], int(words["id"]), Path(words["state"])
    else:
        settings = own_settings(config, given)
        id = client_id(credentials, id)
    if state is None:
        raise ConfigError("a worker keeps what is its client's: give it --state, a folder")
    from fedlora.client.deployment.worker import ClientIdentity, serve
    from fedlora.data.federated import readable
    from fedlora.run.console import show_log
    from fedlora.run.setup import mute_transformers

    show_log(with_times=True)
    mute_transformers()
    try:
        readable(settings.get("data.path", ""))
    except FedloraError as e:  # told by its exit code, so that it is not started again
        print(f"error: {e}")
        raise typer.Exit(2) from e
    serve(socket, ClientIdentity(id, state, settings))


def own_settings(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """A client's own settings, the command line's over the file's, checked before anything is started."""
    from fedlora.config import check_client_settings, flatten, read

    own = (read(config) if config else {}) | given
    built = flatten(check_client_settings(own))
    return {key: built[key] for key in own}


def client_id(credentials: Path | None, id: int | None) -> int:
    """The client's number, as its keys have it or as it is given."""
    if credentials:
        from fedlora.deployment.provision import read_client

        return read_client(credentials).id
    if id is None:
        raise ConfigError("a worker is some client's: give it --credentials, or without keys --id")
    return id
