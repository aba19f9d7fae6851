"""`fedlora simulate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.errors import ConfigError

from .options import OF_A_SIMULATION, takes_settings

if TYPE_CHECKING:
    from fedlora.api import Result


@takes_settings(*OF_A_SIMULATION)
def simulate(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<time>-<strategy>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="At the end one JSON object; the table to stderr.")] = False,
) -> None:
    """Run a federation on this machine; where no model and no data are named, on those that come with fedlora."""
    if resume and (config or out):
        raise ConfigError("--resume takes its settings and folder from the run; leave --config and --out away")
    from rich.console import Console

    from fedlora.api import new_run, run, run_to_resume
    from fedlora.config import read
    from fedlora.run.console import ConsoleProgress, show_log

    show_log()
    screen = ConsoleProgress(Console(highlight=False, soft_wrap=True, stderr=as_json))
    if resume:
        done = run(screen, *run_to_resume(resume, given), goes_on=True)
    else:
        done = run(screen, *new_run(read(config) if config else {}, given, out))
    if as_json:
        print(json.dumps(_facts(done)))


def _facts(done: "Result") -> dict[str, Any]:
    """A run that has ended, for a program."""
    return {
        "folder": str(done.folder),
        "adapter": str(done.adapter),
        "before": done.before,
        "evaluation": done.evaluation,
        "personal": done.personal,
        "rounds": done.rounds,
    }
