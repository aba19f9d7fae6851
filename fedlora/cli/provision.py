"""`fedlora provision`."""

from pathlib import Path
from typing import Annotated

import typer


def provision(
    out: Annotated[Path, typer.Option(help="Folder for all of it; ca.key in it signs, keep it to yourself.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address that clients dial; repeatable.")] = None,
    clients: Annotated[int, typer.Option(min=0, help="So many clients, client-1 and so on.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port that clients dial; default 8443.")] = 0,
    client: Annotated[list[str] | None, typer.Option(help="A client's name; repeatable.")] = None,
    remove: Annotated[str | None, typer.Option(help="A client that is to be let in no more.")] = None,
    days: Annotated[int, typer.Option(help="How long the server's certificate holds.")] = 825,
    renew: Annotated[bool, typer.Option("--renew", help="A new certificate for the server, now.")] = False,
    client_certificates: Annotated[
        bool, typer.Option("--client-certificates", help="No connection without a client's certificate, from now on.")
    ] = False,
) -> None:
    """Make the keys and certificates of a federation: a folder for the server, and one for each client."""
    from fedlora.deployment import provision as make

    if remove:
        lines = make.remove(out, remove)
    else:
        names = [*make.names_for(clients), *(client or ())]
        lines = make.provision(out, host or (), names, days, renew, port=port, client_certificates=client_certificates)
        lines += make.next_step(out, lines)
    for line in lines:
        print(line)
