"""`fedlora check`."""

from typing import Annotated

import typer

from .completion import strategy_names
from .options import Options, pair


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Strategies: names, package.module:Class, file.py; none: all.", autocompletion=strategy_names
        ),
    ] = None,
    option: Options = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Verify what strategies declare: the contract, on random factors and on real small models."""
    from fedlora.checks.report import check

    if not check(names or (), dict(map(pair, option or ())), as_json=as_json):
        raise typer.Exit(1)
