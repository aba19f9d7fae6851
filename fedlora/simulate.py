"""`fedlora simulate` and `fedlora evaluate`, from top to bottom."""

import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint
from . import config as configuration
from .compose import accepts, compose
from .config import FREE, Config
from .console import Screen, figures
from .defaults import over_defaults
from .deploy import again
from .errors import CheckpointError, ConfigError
from .folder import RunFolder
from .metrics import Metrics, spread
from .model import load_peft
from .rounds import Fleet, split
from .run import Setup, drive, own, prepare
from .strategy import Strategy, load


def simulate(file: Path | None, given: Mapping[str, Any], out: Path | None, resume: Path | None) -> None:
    """Run, or go on with, a federation on this machine."""
    screen = Screen()
    folder, config = _resumed(resume, given) if resume else _new(file, given, out)
    screen.say(f"run directory {folder.path}; loading model and data")
    quiet()
    setup = prepare(config)
    folder.create(setup.config, again=resume is not None)
    try:
        _with_fleet(setup, folder, screen, lambda fleet: drive(setup, fleet, folder, screen))
    except KeyboardInterrupt:
        screen.close()
        screen.say(f"interrupted; go on with: fedlora simulate --resume {folder.path}")
        raise
    finally:
        screen.close()


def _new(file: Path | None, given: Mapping[str, Any], out: Path | None) -> tuple[RunFolder, Config]:
    """The folder and the settings of a run that begins, refused before a model is loaded where they make no sense."""
    config = over_defaults(configuration.read(file) if file else {}, given)
    accepts(load(config.strategy, **config.option), config.lora.kind)
    return RunFolder(out or _fresh(config.strategy)), config


def _resumed(path: Path, given: Mapping[str, Any]) -> tuple[RunFolder, Config]:
    """The folder and the settings of a run that goes on; what its finished rounds do not rest on may be changed."""
    fixed = sorted(key for key in given if key not in FREE and not key.startswith("server."))
    if fixed:
        raise ConfigError(f"{fixed[0]} cannot change in a run that is resumed; {', '.join(FREE)} and server.* can")
    folder = RunFolder(path)
    return folder, configuration.build(folder.config(), given)


def evaluate(path: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Print how good the delivered adapter is, beside the base model that the run started from."""
    folder = RunFolder(path)
    config = configuration.build(folder.config(), given)
    quiet()
    setup = again(folder, config)
    if not (folder.adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} has no adapter yet; finish the run with fedlora simulate --resume {path}")
    adapter = load_peft(setup.model, folder.adapter)
    if not setup.evaluation:
        raise ConfigError("there is nothing to evaluate on: give --eval-data")
    strategy = compose(setup.config, setup.start, setup.ranks)
    first = strategy.adapter(strategy.init(setup.start))
    result: dict[str, Any] = {"before": setup.evaluate(first).values(), "after": setup.evaluate(adapter).values()}
    clients = _clients(setup, strategy, folder)
    if clients:
        result["clients"] = spread(clients)
    if as_json:
        print(json.dumps(result))
        return
    for name, values in result.items():
        print(f"{name + ':':9}{figures(values)}")


def _clients(setup: Setup, strategy: Strategy[Any], folder: RunFolder) -> Mapping[int, Metrics]:
    """Each client's own model, with what it keeps, on its own held-out examples; none where it has none."""
    from .simulations.serial import Serial

    last = checkpoint.latest(folder.checkpoints)
    able = [id for id, site in enumerate(setup.sites) if len(site.heldout)]
    if last is None or not able:
        return {}
    fleet = Serial(setup.model, setup.sites, setup.ranks, folder.clients)
    clients = [client for client in fleet.clients() if client.id in able]
    jobs = {client.id: replace(strategy.client_init(last.state, client), round=last.round) for client in clients}
    return split(jobs, fleet.evaluate(jobs))[0]


def _with_fleet(setup: Setup, folder: RunFolder, screen: Screen, serve: Callable[[Fleet], None]) -> None:
    if setup.config.engine == "flower":
        from .simulations import flower

        flower.simulate(setup.config, folder.clients, serve, screen.answered)
    else:
        from .simulations.serial import Serial

        serve(Serial(setup.model, setup.sites, setup.ranks, folder.clients, screen.answered, own(setup.config)))


def _fresh(strategy: str) -> Path:
    """`runs/<time>-<strategy>`, with a number where two runs start in one second."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy.rsplit(':')[-1]}"
    folder, n = Path("runs") / name, 2
    while folder.exists():
        folder, n = Path("runs") / f"{name}-{n}", n + 1
    return folder


def quiet() -> None:
    """Our own warnings, and of the libraries only errors."""
    from transformers.utils import logging as noise

    said: Any = noise  # untyped
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fedlora").setLevel(logging.INFO)
    said.set_verbosity_error()
    said.disable_progress_bar()
