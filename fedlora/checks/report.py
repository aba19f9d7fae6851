"""`fedlora check`: strategies put through the contract, printed as a list for one and as a table for several."""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import strategies
from fedlora.errors import StrategyError, nearest
from fedlora.strategy import Strategy, build_strategy, catalogue, load

if TYPE_CHECKING:
    from .contract import CheckResult

MARKS = {"passed": "+", "failed": "X", "skipped": "."}


def check(specs: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Check what is named, or every built-in, and print what came of it; true where nothing failed.

    A spec is what `fedlora.strategy.load` takes, or a file: `my_lab/mine.py`, `my_lab/mine.py:Mine`. The options are
    those of every strategy named. Raises `StrategyError` for one that cannot be found or built.
    """
    chosen: dict[str, Strategy[Any]] = {}
    for spec in specs or _builtins():
        chosen |= named(spec, options)
    console = Console(highlight=False)
    with console.status("loading"):
        from .contract import CHECKS, label, words
    _quiet_libraries()
    results = {name: _verified(console, name, strategy) for name, strategy in chosen.items()}
    if len(results) == 1:
        (column,) = results.values()
        console.print(_list(column, map(words, CHECKS)))
    else:
        console.print(_table(results, map(label, CHECKS)))
        _print_failures(console, results)
    return _sum_up(console, results)


def named(spec: str, options: Mapping[str, Any]) -> dict[str, Strategy[Any]]:
    """The strategies that a spec names, by name: one, or all that a file defines."""
    file = re.fullmatch(r"(.+\.py)(?::(\w+))?", spec)
    if not file:
        return {spec: load(spec, **options)}
    return {name: build_strategy(cls, options) for name, cls in _classes(Path(file[1]), file[2]).items()}


def _classes(path: Path, wanted: str | None) -> dict[str, type[Strategy[Any]]]:
    """The strategies of a file that are to be checked: the wanted one, or all that need no other to go round."""
    found = _defined_in(path)
    if not found:
        raise StrategyError(f"{path} defines no strategy; one is a subclass of fedlora.strategy.Strategy")
    if not wanted:
        return {name: cls for name, cls in found.items() if not _wraps(cls)}
    if wanted not in found:
        raise StrategyError(f'{path} has no strategy "{wanted}"; {nearest(wanted, found)}')
    return {wanted: found[wanted]}


def _verified(console: Console, name: str, strategy: Strategy[Any]) -> list["CheckResult"]:
    """Every check of one strategy, each shown while it runs."""
    from .contract import CHECKS, label, verify

    results = []
    for check in CHECKS:
        with console.status(Text(f"{name}: {label(check)}")):
            results.append(verify(check, strategy))
    return results


def _builtins() -> list[str]:
    return [entry.name for entry in catalogue() if entry.cls.__module__.startswith(f"{strategies.__name__}.")]


def _defined_in(path: Path) -> dict[str, type[Strategy[Any]]]:
    """The strategies that a file defines, by name; those that it imports are left out."""
    names = vars(_module(path)).items()
    return {name: value for name, value in names if _is_strategy(value) and value.__module__ == _module_name(path)}


def _is_strategy(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy)


def _wraps(cls: type[Strategy[Any]]) -> bool:
    """Does a strategy of this class go round another one, which nobody has named?"""
    return "inner" in getattr(cls, "__dataclass_fields__", {})


def _module_name(path: Path) -> str:
    """The name of the module that a file becomes; no other module has it."""
    return f"fedlora_checked_{path.stem}"


def _module(path: Path) -> ModuleType:
    """The file as a module, known by its name as dataclasses and checkpoints want it."""
    spec = spec_from_file_location(_module_name(path), path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise StrategyError(f"{path}: there is no such file; give a name, package.module:Class or a file of Python")
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # anybody's code
        raise StrategyError(f"{path} cannot be imported: {type(e).__name__}: {e}") from e
    return module


def _quiet_libraries() -> None:
    """Let other libraries print errors alone."""
    from transformers.utils import logging

    untyped: Any = logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _list(results: Sequence["CheckResult"], sentences: Iterator[str]) -> Table:
    """A table with a line a check: what it verifies in words, and under it why it failed or was skipped."""
    table = Table("", "", "seconds", box=None, pad_edge=False, show_header=False)
    for result, sentence in zip(results, sentences, strict=True):
        why = f"\n{result.detail}" if result.detail else ""
        table.add_row(result.outcome, Text(sentence + why), f"{result.seconds:.2f} s")
    return table


def _table(results: Mapping[str, Sequence["CheckResult"]], labels: Iterator[str]) -> Table:
    """A table with a row a check and a column a strategy, its name written downwards, and a mark in each."""
    table = Table("", *("\n".join(name) for name in results), box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for row, name in enumerate(labels):
        table.add_row(name, *(MARKS[column[row].outcome] for column in results.values()))
    return table


def _print_failures(console: Console, results: Mapping[str, Sequence["CheckResult"]]) -> None:
    """Say what the marks of the table mean, and print each failure in full."""
    console.print(f"\n{', '.join(f'{mark} {outcome}' for outcome, mark in MARKS.items())}")
    for result in _with_outcome(results, "failed"):
        console.print(Text(f"{result.check}: {result.detail}"), soft_wrap=True)


def _sum_up(console: Console, results: Mapping[str, Sequence["CheckResult"]]) -> bool:
    """Print how many checks ended in each outcome, and in how many seconds; true where none failed."""
    counts = ", ".join(f"{len(_with_outcome(results, outcome))} {outcome}" for outcome in MARKS)
    seconds = sum(result.seconds for result in chain(*results.values()))
    console.print(f"{len(results)} checked: {counts} in {seconds:.0f} s")
    return not _with_outcome(results, "failed")


def _with_outcome(results: Mapping[str, Sequence["CheckResult"]], outcome: str) -> list["CheckResult"]:
    return [result for result in chain(*results.values()) if result.outcome == outcome]
