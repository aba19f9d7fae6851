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
from .console import Screen
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
    if resume:
        folder = RunFolder(resume)
        config = _resumed(folder, given)
    else:
        config = over_defaults(configuration.read(file) if file else {}, given)
        accepts(load(config.strategy, **config.option), config.lora.kind)  # told before a model is loaded
        folder = RunFolder(out or _fresh(config.strategy))
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


def evaluate(path: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Print how good the delivered adapter is, beside the base model it started from."""
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
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{name + ':':9}{', '.join(shown)}")


def _clients(setup: Setup, strategy: Strategy[Any], folder: RunFolder) -> Mapping[int, Metrics]:
    """Each client's own model, with what it keeps, on its own held-out examples; none where it has none."""
    from .simulations.serial import Serial

    last = checkpoint.latest(folder.checkpoints)
    if last is None or not any(len(site.heldout) for site in setup.sites):
        return {}
    fleet = Serial(setup.model, setup.sites, setup.ranks, folder.clients)
    able = [c for c in fleet.clients() if len(setup.sites[c.id].heldout)]
    jobs = {c.id: replace(strategy.client_init(last.state, c), round=last.round) for c in able}
    return split(jobs, fleet.evaluate(jobs))[0]


def _resumed(folder: RunFolder, given: Mapping[str, Any]) -> Config:
    """The run's own settings; what its finished rounds do not rest on may be changed."""
    fixed = sorted(key for key in given if key not in FREE and not key.startswith("server."))
    if fixed:
        raise ConfigError(f"{fixed[0]} cannot change in a run that is resumed; {', '.join(FREE)} and server.* can")
    return configuration.build(folder.config(), given)


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
