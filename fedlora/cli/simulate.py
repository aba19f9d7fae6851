"""`fedlora simulate` and `fedlora evaluate`, from top to bottom."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.client.policy import policy_of
from fedlora.config import CHANGEABLE_ON_RESUME, Config, over_defaults
from fedlora.errors import ConfigError
from fedlora.run.compose import check_kind_and_ranks
from fedlora.run.console import ConsoleProgress
from fedlora.run.directory import RunDirectory
from fedlora.run.setup import RunSetup, prepare, quiet_libraries
from fedlora.server.rounds import Fleet
from fedlora.server.run import run_rounds
from fedlora.strategy import load


def simulate(file: Path | None, given: Mapping[str, Any], out: Path | None, resume: Path | None) -> None:
    """Run, or go on with, a federation on this machine."""
    screen = ConsoleProgress()
    folder, config = _resumed(resume, given) if resume else _new(file, given, out)
    screen.say(f"run directory {folder.path}; loading model and data")
    quiet_libraries()
    setup = prepare(config)
    folder.create(setup.config, again=resume is not None)
    try:
        _with_fleet(setup, folder, screen, lambda fleet: run_rounds(setup, fleet, folder, screen))
    except KeyboardInterrupt:
        screen.close()
        screen.say(f"interrupted; go on with: fedlora simulate --resume {folder.path}")
        raise
    finally:
        screen.close()


def _new(file: Path | None, given: Mapping[str, Any], out: Path | None) -> tuple[RunDirectory, Config]:
    """The folder and the settings of a run that begins, refused before a model is loaded where they make no sense."""
    config = over_defaults(configuration.read(file) if file else {}, given)
    check_kind_and_ranks(load(config.strategy, **config.option), config.lora.kind)
    return RunDirectory(out or _fresh(config.strategy)), config


def _resumed(path: Path, given: Mapping[str, Any]) -> tuple[RunDirectory, Config]:
    """The folder and the settings of a run that goes on; what its finished rounds do not rest on may be changed."""
    fixed = sorted(key for key in given if key not in CHANGEABLE_ON_RESUME and not key.startswith("server."))
    if fixed:
        raise ConfigError(
            f"{fixed[0]} cannot change in a run that is resumed; {', '.join(CHANGEABLE_ON_RESUME)} and server.* can"
        )
    folder = RunDirectory(path)
    return folder, configuration.build(folder.config(), given)


def _with_fleet(setup: RunSetup, folder: RunDirectory, screen: ConsoleProgress, serve: Callable[[Fleet], None]) -> None:
    if setup.config.engine == "flower":
        from fedlora.simulations import flower

        flower.simulate(setup.config, folder.clients, serve, screen.answered)
    else:
        from fedlora.simulations.serial import Serial

        serve(
            Serial(
                setup.model, setup.clients_data, setup.ranks, folder.clients, screen.answered, policy_of(setup.config)
            )
        )


def _fresh(strategy: str) -> Path:
    """`runs/<time>-<strategy>`, with a number where two runs start in one second."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy.rsplit(':')[-1]}"
    folder, n = Path("runs") / name, 2
    while folder.exists():
        folder, n = Path("runs") / f"{name}-{n}", n + 1
    return folder
