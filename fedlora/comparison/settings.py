"""What is compared: lines of a table, each a strategy with settings of its own, in every case and with every seed.

It is a TOML file, what the command line says, or both:

    like = "other.toml"                 # a comparison beside this one, of which is taken what this one does not say
    config = "sst2.toml"                # a run's settings, beside this file, under all others
    seeds = 3                           # 0, 1 and 2; or a list
    strategies = ["fedavg", "ffa_lora"] # a line each; "all": the whole catalogue
    against = "fedavg"                  # the line that the others are compared with; by default the first strategy
    [settings]                          # of all runs, over config
    rounds = 5
    [[lines]]                           # a line with settings of its own
    name = "ravan of rank 64"
    strategy = "ravan"
    lora.rank = 64
    [cases."epsilon 3"]                 # the whole table once more, with these settings over the lines'
    dp.epsilon = 3.0
    [grid]                              # as a case for every combination of values
    lora.rank = [4, 8]
    [tune]                              # for every line and case the best of these, by what clients hold out
    train.lr = [5e-3, 1.5e-2, 5e-2]

Two lines are always there, of which nothing is federated: `alone` and `pooled` (`baselines.py`).
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import ConfigError, nearest
from fedlora.strategy import catalogue, load

from .baselines import BASELINES, baseline_settings

Layer = Mapping[str, Any]  # settings by their dotted keys
KEYS = ("like", "config", "seeds", "strategies", "against", "settings", "lines", "cases", "grid", "tune")
DEFAULTS: Layer = {"data.holdout": 0.2, "dp.metrics": True}  # clients' own scores are what a comparison is for
SEEDS = 3


@dataclass(frozen=True)
class ComparisonLine:
    """A line of the table: a strategy with its settings beside those of all, or a baseline."""

    name: str
    settings: Layer = field(hash=False)

    @property
    def baseline(self) -> str:
        """Which baseline it is; empty of a strategy."""
        return self.name if self.name in BASELINES else ""


@dataclass(frozen=True)
class Case:
    """Settings with which every line is run, over the line's own; a name for a part of the table."""

    name: str
    settings: Layer = field(hash=False)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that decides which runs there are."""

    base: Layer  # the settings of all runs
    lines: tuple[ComparisonLine, ...]
    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    tune: Mapping[str, tuple[Any, ...]]  # dotted key -> values, in their order
    against: str = ""  # the line with which the others are compared; empty: the first strategy

    @property
    def reference(self) -> str:
        """The line with which the others are compared."""
        return self.against or next((line.name for line in self.lines if not line.baseline), BASELINES[0])

    def config(self, line: ComparisonLine, case: Case, more: Layer) -> Config:
        """The settings of a run of this line in this case, with `more` over them."""
        flat = {**self.base, **line.settings, **case.settings, **more}
        if line.baseline:
            flat = baseline_settings(flat)
        built = configuration.over_defaults({}, flat)
        return configuration.absolute(replace(built, dp=replace(built.dp, ledger="")))  # nobody's budget is charged


def comparison(tree: Mapping[str, Any], given: Layer, folder: Path) -> Comparison:
    """The comparison that a file and the command line say; `given` are settings of all runs, over those of the file.

    `folder` is where the file lies. Raises `ConfigError` for what makes no sense, naming its place.
    """
    for key in tree:
        if key not in KEYS:
            raise ConfigError(f'a comparison has no "{key}"; {nearest(key, KEYS)}')
    run = configuration.read(folder / str(tree["config"])) if "config" in tree else {}
    base = {**DEFAULTS, **run, **configuration.dotted_keys(tree.get("settings", {})), **given}
    made = Comparison(
        base=base,
        lines=tuple(_lines(tree, base)),
        cases=tuple(_cases(tree.get("cases", {}), _axes(tree.get("grid", {}), "grid"))),
        seeds=_seeds(tree.get("seeds", SEEDS)),
        tune=_axes(tree.get("tune", {}), "tune"),
        against=str(tree.get("against", "")),
    )
    _check(made)
    return made


def read(path: Path) -> dict[str, Any]:
    """A comparison's TOML file, over the one that it is like, a key at the top after another."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return read(path.parent / str(tree["like"])) | tree if "like" in tree else tree
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; give the TOML file of a comparison") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from e


def _lines(tree: Mapping[str, Any], base: Layer) -> Iterator[ComparisonLine]:
    """Yield the baselines, the lines with settings of their own, and those of strategies that are named."""
    own = [_line(line) for line in tree.get("lines", ())]
    yield from (ComparisonLine(name, {}) for name in BASELINES)
    yield from own
    named = tree.get("strategies", [] if own else [base.get("strategy", Config.strategy)])
    yield from _plain_lines(named, {line.name for line in own})


def _plain_lines(named: Sequence[str], there: set[str]) -> Iterator[ComparisonLine]:
    """Yield a line for each strategy that is named, and for the catalogue where that is, but for those there are."""
    known = [entry.name for entry in catalogue()] if "all" in named else []
    every = dict.fromkeys([*(name for name in named if name != "all"), *known])
    yield from (ComparisonLine(name, {"strategy": name}) for name in every if name not in there)


def _line(tree: Mapping[str, Any]) -> ComparisonLine:
    flat = configuration.dotted_keys(tree)
    name = str(flat.pop("name", flat.get("strategy", "")))
    if not name:
        raise ConfigError("a line of a comparison needs a name, or a strategy")
    return ComparisonLine(name, flat)


def _cases(named: Mapping[str, Layer], grid: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """Yield the named cases, each at every point of the grid; one without a name where there is neither."""
    points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    for name, settings in (named or {"": {}}).items():
        for point in points:
            words = [name, *(f"{key} = {value}" for key, value in point.items())]
            yield Case(", ".join(filter(None, words)), {**configuration.dotted_keys(settings), **point})


def _axes(tree: Mapping[str, Any], section: str) -> dict[str, tuple[Any, ...]]:
    """The values of each key, which must be several ways to set it."""
    axes = configuration.dotted_keys(tree)
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{section}: {key} = {values!r}: give a list of values, as [4, 8]")
    return {key: tuple(values) for key, values in axes.items()}


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = tuple(range(given)) if isinstance(given, int) else tuple(int(seed) for seed in given)
    if not seeds:
        raise ConfigError("seeds = 0: a comparison needs a seed at least")
    return seeds


def _check(made: Comparison) -> None:
    """Raise a `FedloraError` for names that occur twice, settings that are none, and strategies that are not there."""
    _check_names("line", [line.name for line in made.lines])
    _check_names("case", [case.name for case in made.cases])
    first = {key: values[0] for key, values in made.tune.items()}
    for line, case in product(made.lines, made.cases):
        config = made.config(line, case, first)
        load(config.strategy, **config.option)
        _check_is_here(config)
    if made.tune and made.base.get("data.holdout") == 0:
        raise ConfigError("tune chooses by what clients hold out, and data.holdout = 0; leave one of them out")
    known = [line.name for line in made.lines]
    if made.against and made.against not in known:
        raise ConfigError(f'against: there is no line "{made.against}"; {nearest(made.against, known)}')


def _check_names(kind: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f'two of the comparison have the {kind} name "{twice[0]}"; give each one of its own')


def _check_is_here(config: Config) -> None:
    if config.engine == "flower":
        raise ConfigError("engine = flower: a comparison has processes of its own (--jobs); leave engine out")


def from_words(
    *, strategies: str, seeds: str, grid: Sequence[str], tune: Sequence[str], against: str
) -> dict[str, Any]:
    """What options of the command line say, as a file would; each goes over what the file says."""
    said: dict[str, Any] = {}
    if strategies:
        said |= {"strategies": _words(strategies), "lines": []}
    if seeds:
        said["seeds"] = [_value(word) for word in _words(seeds)] if "," in seeds else _value(seeds)
    if against:
        said["against"] = against
    for section, words in (("grid", grid), ("tune", tune)):
        if words:
            said[section] = dict(_axis(section, word) for word in words)
    return said


def _axis(section: str, word: str) -> tuple[str, list[Any]]:
    """`lora.rank=4,8` as a key and its values."""
    key, equals, values = word.partition("=")
    if not equals or not key or not values:
        raise ConfigError(f"--{section} {word}: write it as lora.rank=4,8")
    return key.strip(), [_value(text) for text in _words(values)]


def _words(text: str) -> list[str]:
    return [word for word in map(str.strip, text.split(",")) if word]


def _value(text: str) -> Any:
    """A word as the number that it writes, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def only(made: Comparison, lines: str) -> Comparison:
    """The comparison with these lines alone, and the baselines. Raises `ConfigError` for a line that is not there."""
    wanted = _words(lines)
    known = [line.name for line in made.lines]
    for name in wanted:
        if name not in known:
            raise ConfigError(f'--lines: there is no "{name}"; {nearest(name, known)}')
    kept = tuple(line for line in made.lines if not wanted or line.baseline or line.name in wanted)
    return replace(made, lines=kept, against=made.against if made.against in {line.name for line in kept} else "")
