"""`fedlora plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import OF_A_SIMULATION, takes_settings


@takes_settings(*OF_A_SIMULATION)
def plan(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Training rows of each client, where the data here are not theirs; 0: as here.")
    ] = 0,
    memory: Annotated[
        str, typer.Option(help="Memory of the machine that is planned for, as 16GB; default: what is free here.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Say what a run will send, take and spend, before it starts; nothing is kept of it."""
    from fedlora.api import checked_settings
    from fedlora.config import read
    from fedlora.estimates.room import amount
    from fedlora.run.console import show_log

    show_log()
    settings, most = checked_settings(read(config) if config else {}, given), amount(memory) if memory else 0
    from fedlora.estimates.estimate import estimate
    from fedlora.run.setup import mute_transformers

    mute_transformers()
    found = estimate(settings, examples=examples, most=most)
    if as_json:
        import json

        print(json.dumps(found.record()))
        return
    print("\n".join(found.lines()))
