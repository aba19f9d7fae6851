"""A federation as a function: what `fedlora simulate` does, for notebooks and scripts, with the command's own names."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedlora.run.client_ranks import listed
from fedlora.run.compose import check_strategy
from fedlora.run.console import ConsoleProgress
from fedlora.run.directory import RunDirectory, newest
from fedlora.run.frames import clients_frame, rounds_frame
from fedlora.run.own_objects import OwnObjects, separate
from fedlora.run.refused import empty_if_refused
from fedlora.run.trackers import check_trackers

from . import config as configuration
from .config import CHANGEABLE_ON_RESUME, Config
from .errors import ConfigError, StrategyError
from .own_code import path_of
from .strategy import load
from .strategy_files import spec_of

if TYPE_CHECKING:  # which load transformers and PEFT: a run says its first line before it waits for them
    from fedlora.run.setup import RunSetup
    from fedlora.server.rounds import Fleet


RUNS = Path("runs")  # where a run goes that is given no folder


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
        first: Mapping[str, Any] = next(iter(self.rounds), {})
        before: Mapping[str, float] = first.get("before", {})
        return before

    @property
    def evaluation(self) -> Mapping[str, float]:
        """The last evaluation of the global model, such as its loss and accuracy; empty where there was none."""
        evaluation: Mapping[str, float] = newest(self.rounds, "eval").get("eval", {})
        return evaluation

    @property
    def personal(self) -> Mapping[str, Any]:
        """What is told of what clients did by themselves after the last round; empty where they did nothing."""
        return RunDirectory(self.folder).stages()

    def frame(self) -> Any:
        """A `pandas.DataFrame` of the rounds: a row each, and one of round 0 for the evaluation before the first.

        Its columns are the keys of rounds.jsonl that hold numbers (`eval/accuracy`, `bytes_up`, ...), and what tells
        runs apart: `run`, `strategy`, `seed`.
        """
        return rounds_frame(RunDirectory(self.folder), self.rounds)

    def clients(self) -> Any:
        """A `pandas.DataFrame` with a row for every client of every round, of what may be told of single clients."""
        return clients_frame(RunDirectory(self.folder), self.rounds)


def open_run(folder: str | Path) -> Result:
    """The run that lies in a folder, as far as it has come. Raises `ConfigError` where there is none."""
    directory = RunDirectory(Path(folder))
    directory.config()
    return Result(directory.path, tuple(directory.records()))


def simulate(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    on_round: Callable[[Mapping[str, Any]], object] | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Result:
    """Run a federation on this machine, and return what came of it.

    `config` is a `Config`, a mapping, or the path of a TOML file. `settings` go over it: by the names of the command's
    options (`clients=50`, `dp_epsilon=3.0`), by section (`train={"lr": 2e-3}`), or by dotted key
    (`**{"train.lr": 2e-3}`). `strategy` may also be a `Strategy` or a class of one, and a setting that names code
    (`train.loss`, ...) a function, a class or an object. `out` is the run directory, by default
    `runs/<time>-<strategy>`; `resume` is the directory of a run to go on with. `progress` shows each round.

    `on_round` is called after every round with its record, the line of rounds.jsonl; where it raises `StopRun`, the run
    ends there with its adapter written. `data` and `eval_data` may also be rows: a list of mappings, a DataFrame, a
    `datasets.Dataset`, or a list or mapping of such with one a client; `model` may be a transformers model, with its
    `tokenizer`. These are written into the run directory, under `given/`.

    Raises a `FedloraError` for every mistake that the caller can mend; the rounds before it are kept for `resume`.
    """
    if resume and (config or out):
        raise ConfigError("resume takes its settings and folder from the run; leave config and out away")
    screen = ConsoleProgress() if progress else ConsoleProgress(Console(quiet=True))
    own, plain = separate(settings, tokenizer)
    given = by_key(plain)
    if resume:
        return run(screen, *run_to_resume(Path(resume), given), goes_on=True, on_round=on_round)
    return run(screen, *new_run(_layer(config), given, Path(out) if out else None), on_round=on_round, own=own)


def new_run(layer: Mapping[str, Any], given: Mapping[str, Any], out: Path | None) -> tuple[RunDirectory, Config]:
    """The directory and the settings of a run that begins, refused before a model is loaded where they make no sense.

    `given` goes over `layer`, and both over the embedded run's settings where neither names a model or data.
    """
    config = checked_settings(layer, given)
    return RunDirectory(out or _unused(config.strategy)), config


def checked_settings(layer: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The settings of a run that begins, as `new_run` has them, without making anything."""
    if given.get("dp.noise") == 0:
        raise ConfigError("dp.noise = 0 adds no noise; leave it out, or give noise over clip, as 1.0")
    config = configuration.over_defaults(layer, given)
    strategy = load(config.strategy, **config.option)
    check_strategy(strategy, config, listed(config.lora.ranks))
    return config


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


def run(
    screen: ConsoleProgress,
    folder: RunDirectory,
    config: Config,
    *,
    goes_on: bool = False,
    on_round: Callable[[Mapping[str, Any]], object] | None = None,
    own: OwnObjects | None = None,
) -> Result:
    """Load model and data, run the rounds that are left, and write the adapter, as the only process that writes there.

    Objects of the caller's `own` are kept there first. Raises `ConfigError` where another process writes there. A run
    that is refused before a client has worked leaves nothing.
    """
    with _kept_if_full(folder.path.parent), folder.only_writer(), empty_if_refused(folder.path):
        if own:
            folder.check_is_new()
            config = own.keep(folder.path, config)
        check_trackers(config.report_to)
        screen.say(f"run directory {folder.path}, {_engine_words(config)}; loading model and data")
        from fedlora.run.setup import mute_transformers, prepare
        from fedlora.server.run import run_rounds
        from fedlora.simulations.local_clients import charges_in_ledgers

        mute_transformers()
        setup = prepare(config)
        folder.create(setup.config, again=goes_on, files=setup.files)
        try:
            charged = charges_in_ledgers(setup.config, setup.clients_data, folder.clients)
            play = partial(run_rounds, charged=charged, on_round=on_round)
            _with_fleet(setup, folder, screen, lambda fleet: play(setup, fleet, folder, screen))
        except KeyboardInterrupt:
            screen.close()
            screen.say(f"interrupted; go on with: fedlora simulate --resume {folder.path}")
            raise
        finally:
            screen.close()
        return Result(folder.path, tuple(folder.records()))


def _with_fleet(
    setup: "RunSetup", folder: RunDirectory, screen: ConsoleProgress, serve: Callable[["Fleet"], None]
) -> None:
    """Have `serve` use the run's clients: in Flower's simulation, or in this process by one model."""
    from fedlora.simulations.fleets import fleet_here, on_clock

    if setup.config.engine == "flower":
        from fedlora.simulations import flower

        flower.simulate(
            setup.config, folder.clients, lambda fleet: serve(on_clock(setup.config, fleet)), screen.answered
        )
        return
    serve(on_clock(setup.config, fleet_here(setup, folder.clients, screen.answered)))


def _engine_words(config: Config) -> str:
    """The engine that runs these settings and, where it is not the one that was asked for, why."""
    engine = configuration.engine_of(config)
    why = f" ({configuration.why_apart(config)})" if engine not in ("stacked", config.engine) else ""
    return f"engine {engine}{why}"


def _unused(strategy: str) -> Path:
    """Make `runs/<time>-<strategy>`, with a number where several runs start in one second, and return it."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(strategy.rsplit(':')[-1]).stem}"
    for ending in chain([""], (f"-{n}" for n in count(2))):
        with suppress(FileExistsError):
            folder = RUNS / f"{name}{ending}"
            folder.mkdir(parents=True)
            return folder
    raise AssertionError("count never ends")


@contextmanager
def _kept_if_full(runs: Path) -> Iterator[None]:
    """Remove the default folder of all runs after a `with` in which the only one was refused."""
    try:
        yield
    finally:
        if runs == RUNS:
            with suppress(OSError):  # it has runs in it
                runs.rmdir()


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
    return {key: _plain(key, value) for key, value in given.items() if value is not None}


def _plain(key: str, value: Any) -> Any:
    """A value as settings hold it: of a path its text, of code where it is found again."""
    if callable(value):
        return path_of(key, value)
    return str(value) if isinstance(value, Path) else value


def _flat(name: str, value: Any) -> dict[str, Any]:
    """One setting, or a section of them, by dotted keys."""
    if isinstance(value, Mapping):
        return configuration.dotted_keys({name: dict(value)})
    if name == "strategy" and not isinstance(value, str | None):
        return _strategy(value)
    return {configuration.setting_key(name): value}


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
    return {"strategy": spec_of(cls)} | {f"option.{name}": value for name, value in options.items()}
