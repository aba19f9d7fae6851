"""A federation as a function: what `fedlora simulate` does, for notebooks and scripts, with the command's own names."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedlora.run.compose import check_kind_and_ranks
from fedlora.run.console import ConsoleProgress
from fedlora.run.directory import RunDirectory, newest

from . import config as configuration
from .config import CHANGEABLE_ON_RESUME, SHORT, Config
from .errors import ConfigError, LedgerError, StrategyError
from .jobs import Charge
from .strategy import load

if TYPE_CHECKING:  # which load transformers and PEFT: a run says its first line before it waits for them
    from fedlora.run.setup import RunSetup
    from fedlora.server.rounds import Fleet


@dataclass(frozen=True)
class Result:
    """A run that has ended, as it lies on the disk."""

    folder: Path  # the run directory
    rounds: tuple[Mapping[str, Any], ...]  # the record of each round: its line in rounds.jsonl

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, for `peft.PeftModel.from_pretrained`."""
        return RunDirectory(self.folder).adapter

    @property
    def before(self) -> Mapping[str, float]:
        """The evaluation of the global model before the first round; empty where there was nothing to evaluate on."""
        before: Mapping[str, float] = self.rounds[0].get("before", {})
        return before

    @property
    def evaluation(self) -> Mapping[str, float]:
        """The last evaluation of the global model, such as its loss and accuracy; empty where there was none."""
        evaluation: Mapping[str, float] = newest(self.rounds, "eval").get("eval", {})
        return evaluation


def simulate(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Run a federation on this machine, and return what came of it.

    `config` is a `Config`, a mapping, or the path of a TOML file. `settings` go over it: by the names of the command's
    options (`clients=50`, `dp_epsilon=3.0`), by section (`train={"lr": 2e-3}`), or by dotted key
    (`**{"train.lr": 2e-3}`). `strategy` may also be a `Strategy` or a class of one. `out` is the run directory, by
    default `runs/<time>-<strategy>`; `resume` is the directory of a run to go on with. `progress` shows each round.

    Raises a `FedloraError` for every mistake that the caller can mend; the rounds before it are kept for `resume`.
    """
    if resume and (config or out):
        raise ConfigError("resume takes its settings and folder from the run; leave config and out away")
    screen = ConsoleProgress() if progress else ConsoleProgress(Console(quiet=True))
    given = by_key(settings)
    if resume:
        return run(screen, *run_to_resume(Path(resume), given), goes_on=True)
    return run(screen, *new_run(_layer(config), given, Path(out) if out else None))


def new_run(layer: Mapping[str, Any], given: Mapping[str, Any], out: Path | None) -> tuple[RunDirectory, Config]:
    """The directory and the settings of a run that begins, refused before a model is loaded where they make no sense.

    `given` goes over `layer`, and both over the embedded run's settings where neither names a model or data.
    """
    if given.get("dp.noise") == 0:
        raise ConfigError("dp.noise = 0 adds no noise; leave it out, or give noise over clip, as 1.0")
    config = configuration.over_defaults(layer, given)
    check_kind_and_ranks(load(config.strategy, **config.option), config.lora.kind)
    return RunDirectory(out or _unused(config.strategy)), config


def run_to_resume(path: Path, given: Mapping[str, Any]) -> tuple[RunDirectory, Config]:
    """The directory and the settings of a run that goes on; only what its finished rounds do not rest on may change."""
    fixed = sorted(key for key in given if not configuration.may_change(key))
    if fixed:
        raise ConfigError(
            f"{fixed[0]} cannot change in a run that is resumed; {', '.join(CHANGEABLE_ON_RESUME)}, server.* and "
            "eval.* can"
        )
    folder = RunDirectory(path)
    return folder, configuration.build(folder.config(), given)


def run(screen: ConsoleProgress, folder: RunDirectory, config: Config, *, goes_on: bool = False) -> Result:
    """Load model and data, run the rounds that are left, and write the adapter, as the only process that writes there.

    Raises `ConfigError` where another process does.
    """
    with folder.only_writer():
        screen.say(f"run directory {folder.path}, {_engine_words(config)}; loading model and data")
        from fedlora.run.setup import mute_transformers, prepare
        from fedlora.server.run import run_rounds

        mute_transformers()
        setup = prepare(config)
        folder.create(setup.config, again=goes_on, files=setup.files)
        try:
            charged = _charged(setup, folder)
            _with_fleet(setup, folder, screen, lambda fleet: run_rounds(setup, fleet, folder, screen, charged=charged))
        except KeyboardInterrupt:
            screen.close()
            screen.say(f"interrupted; go on with: fedlora simulate --resume {folder.path}")
            raise
        finally:
            screen.close()
        return Result(folder.path, tuple(folder.records()))


def _charged(setup: "RunSetup", folder: RunDirectory) -> dict[int, list[Charge]]:
    """What every client's ledger holds, of this run and of others; one that is not whole is its client's to refuse."""
    from fedlora.client.policy import policy_of
    from fedlora.client.runner import JobRunner

    charged: dict[int, list[Charge]] = {}
    policy = policy_of(setup.config)
    for i, data in enumerate(setup.clients_data if setup.config.dp.by_record else ()):
        with suppress(LedgerError):
            charged[i] = JobRunner(i, data, folder.clients / str(i), policy).ledger.charges()
    return {i: charges for i, charges in charged.items() if charges}


def _with_fleet(
    setup: "RunSetup", folder: RunDirectory, screen: ConsoleProgress, serve: Callable[["Fleet"], None]
) -> None:
    """Have `serve` use the run's clients: in Flower's simulation, or in this process by one model."""
    if setup.config.engine == "flower":
        from fedlora.simulations import flower

        flower.simulate(setup.config, folder.clients, serve, screen.answered)
        return
    from fedlora.client.policy import policy_of
    from fedlora.simulations.serial import Serial
    from fedlora.simulations.stacked import Stacked

    engine = Serial if setup.config.engine == "serial" else Stacked
    policy = policy_of(setup.config)
    serve(engine(setup.model, setup.clients_data, setup.ranks, folder.clients, screen.answered, policy))


def _engine_words(config: Config) -> str:
    """The engine that runs these settings and, where it is not the one that was asked for, why."""
    engine = configuration.engine_of(config)
    why = f" ({configuration.why_apart(config)})" if engine not in ("stacked", config.engine) else ""
    return f"engine {engine}{why}"


def _unused(strategy: str) -> Path:
    """Make `runs/<time>-<strategy>`, with a number where several runs start in one second, and return it."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy.rsplit(':')[-1]}"
    for ending in chain([""], (f"-{n}" for n in count(2))):
        with suppress(FileExistsError):
            folder = Path("runs") / f"{name}{ending}"
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("count never ends")


def _layer(config: Config | Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """The settings under the keywords, by their dotted keys."""
    if config is None:
        return {}
    if isinstance(config, Config):
        return configuration.flatten(config)
    return by_key(config) if isinstance(config, Mapping) else configuration.read(Path(config))


def by_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted keys; they may come by short names, and sections as mappings. None is not given."""
    given: dict[str, Any] = {}
    for name, value in settings.items():
        given |= _flat(name, value)
    return {key: str(value) if isinstance(value, Path) else value for key, value in given.items() if value is not None}


def _flat(name: str, value: Any) -> dict[str, Any]:
    """One setting, or a section of them, by dotted keys."""
    if isinstance(value, Mapping):
        return configuration.dotted_keys({name: dict(value)})
    if name == "strategy" and not isinstance(value, str | None):
        return _strategy(value)
    return {SHORT.get(name, name): value}


def _strategy(strategy: Any) -> dict[str, Any]:
    """A strategy as settings: where its class is found again when the run is resumed, and its options."""
    cls = strategy if isinstance(strategy, type) else type(strategy)
    path = f"{cls.__module__}:{cls.__qualname__}"
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        raise StrategyError(
            f"strategy {cls.__name__} is not to be found as {path}, by which a run keeps it; define it at the top of "
            "a module or notebook"
        )
    options = {} if strategy is cls else vars(strategy)
    return {"strategy": path} | {f"option.{name}": value for name, value in options.items()}
