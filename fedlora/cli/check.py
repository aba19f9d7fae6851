"""`fedlora check`."""

from typing import Annotated

import typer

from .options import Options, pair


def check(
    names: Annotated[list[str] | None, typer.Argument(help="Names, package.module:Class, file.py; none: all.")] = None,
    option: Options = None,
) -> None:
    """Verify what strategies declare: the contract, on random factors and on real small models."""
    from fedlora.checks.report import check

    if not check(names or (), dict(map(pair, option or ()))):
        raise typer.Exit(1)
