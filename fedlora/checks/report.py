"""`fedlora check`: strategies put through the contract, told as a list for one and as a table for several."""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import strategies
from fedlora.errors import StrategyError, nearest
from fedlora.strategy import Strategy, build, catalogue, load

if TYPE_CHECKING:
    from .contract import Result

MARKS = {"passed": "+", "failed": "X", "skipped": "."}


def check(specs: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Check what is named, or every built-in, and print what came of it; true where nothing failed.

    A spec is what `fedlora.strategy.load` takes, or a file: `my_lab/mine.py`, `my_lab/mine.py:Mine`. The options are
    those of every strategy named. Raises `StrategyError` for one that cannot be found or built.
    """
    chosen = dict(pair for spec in specs or _builtins() for pair in named(spec, options))
    console = Console(highlight=False)
    with console.status("loading"):
        from .contract import CHECKS, label, verify, words
    _quiet()
    results: dict[str, list[Result]] = {name: [] for name in chosen}
    for name, strategy in chosen.items():
        for one in CHECKS:
            with console.status(Text(f"{name}: {label(one)}")):
                results[name].append(verify(one, strategy))
    alone = next(iter(results.values())) if len(results) == 1 else None
    console.print(_list(alone, map(words, CHECKS)) if alone else _table(results, map(label, CHECKS)))
    return _sum_up(console, results)


def named(spec: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Strategy[Any]]]:
    """The strategies that a spec names, each with its name: one, or all that a file defines."""
    if not (file := re.fullmatch(r"(.+\.py)(?::(\w+))?", spec)):
        yield spec, load(spec, **options)
        return
    path, wanted = Path(file[1]), file[2]
    found = {name: c for name, c in vars(_module(path)).items() if _is_strategy(c) and c.__module__ == _name(path)}
    if wanted and wanted not in found:
        raise StrategyError(f'{path} has no strategy "{wanted}"; {nearest(wanted, found)}')
    if not found:
        raise StrategyError(f"{path} defines no strategy; one is a subclass of fedlora.strategy.Strategy")
    for name, cls in found.items():
        if name == wanted or (not wanted and "inner" not in getattr(cls, "__dataclass_fields__", {})):
            yield name, build(cls, options)


def _builtins() -> list[str]:
    return [entry.name for entry in catalogue() if entry.cls.__module__.startswith(f"{strategies.__name__}.")]


def _is_strategy(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy)


def _name(path: Path) -> str:
    """Of the module that a file becomes; it hides no other."""
    return f"fedlora_checked_{path.stem}"


def _module(path: Path) -> ModuleType:
    """The file as a module, known by its name as dataclasses and checkpoints want it."""
    spec = spec_from_file_location(_name(path), path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise StrategyError(f"{path}: there is no such file; give a name, package.module:Class or a file of Python")
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # anybody's code
        raise StrategyError(f"{path} cannot be imported: {type(e).__name__}: {e}") from e
    return module


def _quiet() -> None:
    """Of the libraries only errors."""
    from transformers.utils import logging as noise

    said: Any = noise  # untyped
    said.set_verbosity_error()
    said.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _list(results: Sequence["Result"], sentences: Iterator[str]) -> Table:
    """A line a check, with what it verifies in words, and under it why it failed or was skipped."""
    table = Table("", "", "seconds", box=None, pad_edge=False, show_header=False)
    for result, sentence in zip(results, sentences, strict=True):
        why = f"\n{result.detail}" if result.detail else ""
        table.add_row(result.outcome, Text(sentence + why), f"{result.seconds:.2f} s")
    return table


def _table(results: Mapping[str, Sequence["Result"]], labels: Iterator[str]) -> Table:
    """A row a check, a column a strategy with its name downwards, a mark in each."""
    table = Table("", *("\n".join(name) for name in results), box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for row, name in enumerate(labels):
        table.add_row(name, *(MARKS[column[row].outcome] for column in results.values()))
    return table


def _sum_up(console: Console, results: Mapping[str, Sequence["Result"]]) -> bool:
    """The failures in full where they stand in a table, and how many there are of each outcome."""
    every = [result for column in results.values() for result in column]
    failed = [result for result in every if result.outcome == "failed"]
    if len(results) > 1:
        console.print(f"\n{', '.join(f'{mark} {outcome}' for outcome, mark in MARKS.items())}")
        for result in failed:
            console.print(Text(f"{result.check}: {result.detail}"), soft_wrap=True)
    counts = ", ".join(f"{sum(r.outcome == outcome for r in every)} {outcome}" for outcome in MARKS)
    console.print(f"{len(results)} checked: {counts} in {sum(r.seconds for r in every):.0f} s")
    return not failed
