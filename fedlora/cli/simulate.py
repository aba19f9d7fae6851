"""`fedlora simulate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.errors import ConfigError

from .options import takes_settings


@takes_settings(
    "clients",
    "rounds",
    "cohort",
    "strategy",
    "option",
    "model",
    "data",
    "eval_data",
    "partition",
    "engine",
    "seed",
    "dp_epsilon",
    "dp_delta",
    "dp_clip",
    "dp_noise",
    "dp_level",
)
def simulate(
    given: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<time>-<strategy>.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this directory.")] = None,
) -> None:
    """Run a federation on this machine; where no model and no data are named, on those that come with fedlora."""
    if resume and (config or out):
        raise ConfigError("--resume takes its settings and folder from the run; leave --config and --out away")
    from fedlora.api import new_run, run, run_to_resume
    from fedlora.config import read
    from fedlora.run.console import ConsoleProgress, show_log

    show_log()
    if resume:
        run(ConsoleProgress(), *run_to_resume(resume, given), goes_on=True)
    else:
        run(ConsoleProgress(), *new_run(read(config) if config else {}, given, out))
