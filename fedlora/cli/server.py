"""`fedlora server`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import check_credentials, takes_settings


@takes_settings(
    "clients",
    "rounds",
    "cohort",
    "strategy",
    "option",
    "model",
    "eval_data",
    "seed",
    clients="clients there are; default: as many as have keys",
    eval_data="data for the global evaluation; of clients' data the server has none",
)
def server(
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Run directory; started again with the same one, the run goes on.")],
    credentials: Annotated[Path | None, typer.Option(help="The server's folder of fedlora provision.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys: for trials alone.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: as its keys have it, or 8443.")] = None,
    superlink: Annotated[str, typer.Option(help="HOST:PORT of a SuperLink that runs elsewhere, behind a proxy.")] = "",
    metrics_port: Annotated[int, typer.Option(min=0, help="Port of Prometheus' metrics; 0: none.")] = 0,
    metrics_host: Annotated[str, typer.Option(help="Address of Prometheus' metrics.")] = "127.0.0.1",
) -> None:
    """Serve a run to clients on other machines."""
    check_credentials(credentials, insecure, "server")
    from fedlora.deployment.addresses import PORT
    from fedlora.deployment.provision import listen_port
    from fedlora.server.deployment.supervisor import ServerOptions, serve

    metrics = f"{metrics_host}:{metrics_port}" if metrics_port else ""
    if port is None:
        port = listen_port(credentials) if credentials else PORT
    serve(ServerOptions(out, credentials, host, port, superlink, metrics), config, given)
