"""The commands of a deployment: `provision`, `server`, `client`, `worker`. Light at the top, as `__main__` is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.errors import ConfigError, FedloraError

DOTTED = {"allow_extra_args": True, "ignore_unknown_options": True}
Text = str | None
app = typer.Typer(add_completion=False)


@app.command()
def provision(
    out: Annotated[Path, typer.Option(help="Folder for all of it; ca.key in it signs, keep it to yourself.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address that clients dial; repeatable.")] = None,
    clients: Annotated[int, typer.Option(min=0, help="So many clients, client-1 and so on.")] = 0,
    client: Annotated[list[str] | None, typer.Option(help="A client's name; repeatable.")] = None,
    remove: Annotated[Text, typer.Option(help="A client that is to be let in no more.")] = None,
    days: Annotated[int, typer.Option(help="How long the server's certificate holds.")] = 825,
    renew: Annotated[bool, typer.Option("--renew", help="A new certificate for the server, now.")] = False,
) -> None:
    """Make the keys and certificates of a federation: a folder for the server, and one for each client."""
    from fedlora.deployment import provision as make

    if remove:
        lines = make.remove(out, remove)
    else:
        lines = make.provision(out, host or (), [*make.names_for(clients), *(client or ())], days, renew)
    for line in lines:
        print(line)


@app.command(context_settings=DOTTED)
def server(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Run directory; started again with the same one, the run goes on.")],
    credentials: Annotated[Path | None, typer.Option(help="The server's folder of fedlora provision.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys: for trials alone.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Clients there are; default: as many as have keys.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Federated rounds.")] = None,
    cohort: Annotated[int | None, typer.Option(min=1, help="Clients asked in a round.")] = None,
    strategy: Annotated[Text, typer.Option(help="Name (see fedlora strategies) or package.module:Class.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of the strategy, key=value; repeatable.")] = None,
    model: Annotated[Text, typer.Option(help="Folder or hub id of the base model.")] = None,
    eval_data: Annotated[
        Text, typer.Option(help="For the global evaluation; of clients' data the server has none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8443,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of a SuperLink that runs elsewhere, behind a proxy.")] = "",
    metrics_port: Annotated[int, typer.Option(min=0, help="Port of Prometheus' metrics; 0: none.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="Address of Prometheus' metrics.")] = "127.0.0.1",
) -> None:
    """Serve a run to clients on other machines. Every setting of `fedlora settings` is an option too."""
    from .options import dotted, pair

    _needs(credentials, insecure, "server")
    flags = {
        "clients": clients,
        "rounds": rounds,
        "cohort": cohort,
        "strategy": strategy,
        "model.path": model,
        "data.eval": eval_data,
        "seed": seed,
    }
    given: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    given |= {f"option.{key}": value for key, value in map(pair, option or ())} | dotted(context.args)
    from fedlora.server.deployment.supervisor import ServerOptions, serve

    metrics = f"{metrics_host}:{metrics_port}" if metrics_port else ""
    serve(ServerOptions(out, credentials, host, port, superlink, metrics), config, given)


@app.command(context_settings=DOTTED)
def client(
    context: typer.Context,
    state: Annotated[Path, typer.Option(help="Folder for what this client keeps, for all runs and for ever.")],
    server: Annotated[str, typer.Option(help="HOST or HOST:PORT; default: as its keys have it.")] = "",
    credentials: Annotated[Path | None, typer.Option(help="This client's folder of fedlora provision.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no key: for trials alone.")] = False,
    id: Annotated[int | None, typer.Option(min=0, help="This client's number, without keys.")] = None,
    data: Annotated[
        Text, typer.Option(help="File or folder of its own data; none: its share of the embedded ones.")
    ] = None,
    model: Annotated[
        Text, typer.Option(help="Folder of the base model here, where the server's is one of its own.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of its own.")] = None,
    worker: Annotated[Path | None, typer.Option(help="Socket of a fedlora worker that is started elsewhere.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Load the model for every message: slow, but small between.")
    ] = False,
) -> None:
    """Take part in runs of a server. Its own settings are options too: where its data are, and what it insists on."""
    from fedlora.client.deployment.supervisor import asked, serve

    _needs(credentials, insecure, "client")
    who = asked(server, credentials, state, id, _mine(context, config, data, model))
    serve(replace(who, worker=worker, cold=cold))


@app.command(context_settings=DOTTED)
def worker(
    context: typer.Context,
    socket: Annotated[Path, typer.Option(help="Unix socket to serve on.")],
    state: Annotated[Path | None, typer.Option(help="Folder for what this client keeps.")] = None,
    credentials: Annotated[Path | None, typer.Option(help="This client's folder of fedlora provision.")] = None,
    id: Annotated[int | None, typer.Option(min=0, help="This client's number, without keys.")] = None,
    data: Annotated[Text, typer.Option(help="File or folder of its own data.")] = None,
    model: Annotated[Text, typer.Option(help="Folder of the base model here.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of its own.")] = None,
    told: Annotated[str, typer.Option(help="All of this as JSON, from fedlora client.", hidden=True)] = "",
) -> None:
    """Hold a client's model, data and state, and do jobs over a Unix socket; `fedlora client` starts one itself."""
    if told:
        words = json.loads(told)
        settings, id, state = words["settings"], int(words["id"]), Path(words["state"])
    else:
        settings = _mine(context, config, data, model)
        id = _number(credentials, id)
    if state is None:
        raise ConfigError("a worker keeps what is its client's: give it --state, a folder")
    from fedlora.client.deployment.worker import ClientIdentity, serve
    from fedlora.data.federated import readable
    from fedlora.run.setup import quiet_libraries

    quiet_libraries()
    try:
        readable(settings.get("data.path", ""))
    except FedloraError as e:  # told by its exit code, so that it is not started again
        print(f"error: {e}")
        raise typer.Exit(2) from e
    serve(socket, ClientIdentity(id, state, settings))


def _mine(context: typer.Context, config: Path | None, data: Text, model: Text) -> dict[str, Any]:
    """A client's own settings, checked before anything is started."""
    from fedlora import config as configuration

    from .options import dotted

    flags = {"data.path": data, "model.path": model}
    given = configuration.read(config) if config else {}
    given |= {key: value for key, value in flags.items() if value is not None} | dotted(context.args)
    built = configuration.flatten(configuration.check_client_settings(given))
    return {key: built[key] for key in given}


def _number(credentials: Path | None, id: int | None) -> int:
    if credentials:
        from fedlora.deployment.provision import read_client

        return read_client(credentials).id
    if id is None:
        raise ConfigError("a worker is some client's: give it --credentials, or without keys --id")
    return id


def _needs(credentials: Path | None, insecure: bool, who: str) -> None:
    if credentials is None and not insecure:
        raise ConfigError(
            f"a {who} needs --credentials, its folder of fedlora provision; for a trial without TLS and keys, say "
            "--insecure"
        )
    if credentials is not None and insecure:
        raise ConfigError("--insecure uses no keys: leave --credentials away, or --insecure")
