"""`fedlora check`: strategies put through the contract, printed as a list for one and as a table for several."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from inspect import isabstract
from itertools import chain
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import strategies
from fedlora.errors import StrategyError
from fedlora.strategy import Strategy, build_strategy, catalogue, defined_in, is_wrapper, load
from fedlora.strategy_files import path_and_name

if TYPE_CHECKING:
    from .contract import CheckResult

MARKS = {"passed": "+", "failed": "X", "skipped": "."}


def check(specs: Sequence[str], options: Mapping[str, Any], *, as_json: bool = False) -> bool:
    """Check what is named, or every built-in, and print what came of it; true where nothing failed.

    A spec is what `fedlora.strategy.load` takes, or a file: `my_lab/mine.py`, `my_lab/mine.py:Mine`. The options are
    those of every strategy named. Raises `StrategyError` for one that cannot be found or built.
    """
    made: dict[str, Strategy[Any] | StrategyError] = {}
    for spec in specs or _builtins():
        made |= named(spec, options)
    console = Console(highlight=False, stderr=as_json, force_jupyter=False)  # in a notebook plain lines, as elsewhere
    with console.status("loading"):
        from . import contract  # noqa: F401  # which loads torch, transformers and PEFT
    _quiet_libraries()
    results = {
        name: _checked(console, name, strategy) for name, strategy in made.items() if isinstance(strategy, Strategy)
    }
    unmade = {name: str(made[name]) for name in made.keys() - results.keys()}
    passed = not _with_outcome(results, "failed") and not unmade
    if as_json:
        print(json.dumps({"passed": passed, "strategies": _facts(results), "not_checked": unmade}))
        return passed
    _print(console, results)
    for name, why in unmade.items():
        console.print(Text(f"{name} was not checked: {why}"), soft_wrap=True)
    _sum_up(console, results)
    return passed


def _facts(results: Mapping[str, Sequence["CheckResult"]]) -> dict[str, list[dict[str, Any]]]:
    """What came of the checks of each strategy, for a program."""
    return {
        name: [{**asdict(result), "seconds": round(result.seconds, 3)} for result in column]
        for name, column in results.items()
    }


def named(spec: str, options: Mapping[str, Any]) -> dict[str, Strategy[Any] | StrategyError]:
    """The strategies that a spec names, by name: one, or of a file all that go round no other.

    Of a file one that cannot be built is an error in its place, which keeps no other from being checked.
    """
    file = path_and_name(spec)
    if not file or file[1]:
        return {spec: load(spec, **options)}
    found = {name: cls for name, cls in defined_in(file[0]).items() if not is_wrapper(cls)}
    return {name: _built(cls, options) for name, cls in found.items() if not _is_base(cls, found.values())}


def _checked(console: Console, name: str, strategy: Strategy[Any]) -> list["CheckResult"]:
    """What came of the checks of one strategy, each shown while it runs."""
    from .contract import label, run

    with console.status(name) as status:
        return run(strategy, lambda check: status.update(Text(f"{name}: {label(check)}")))


def _built(cls: type[Strategy[Any]], options: Mapping[str, Any]) -> Strategy[Any] | StrategyError:
    try:
        return build_strategy(cls, options)
    except StrategyError as e:
        return e


def _is_base(cls: type[Strategy[Any]], others: Iterable[type[Strategy[Any]]]) -> bool:
    """Is it an abstract class that others of the file are made of?"""
    return isabstract(cls) and any(issubclass(other, cls) for other in others if other is not cls)


def _builtins() -> list[str]:
    return [entry.name for entry in catalogue() if entry.cls.__module__.startswith(f"{strategies.__name__}.")]


def _quiet_libraries() -> None:
    """Let other libraries print errors alone."""
    from transformers.utils import logging

    untyped: Any = logging
    untyped.set_verbosity_error()
    untyped.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _print(console: Console, results: Mapping[str, Sequence["CheckResult"]]) -> None:
    """Print what came of the checks, and of each strategy that fails what is most likely to be done."""
    if len(results) == 1:
        console.print(_list(*results.values()))
    elif results:
        console.print(_table(results))
        _print_failures(console, results)
    for name, column in results.items():
        _print_diagnosis(console, name, column)


def _list(results: Sequence["CheckResult"]) -> Table:
    """A table with a line a check: what it verifies in words, and under it why it failed or was skipped."""
    from .contract import CHECKS, words

    table = Table("", "", "seconds", box=None, pad_edge=False, show_header=False)
    for result, check in zip(results, CHECKS, strict=False):  # after a failure of its structure none was run
        why = f"\n{result.detail}" if result.detail else ""
        table.add_row(result.outcome, Text(words(check) + why), f"{result.seconds:.2f} s")
    return table


def _table(results: Mapping[str, Sequence["CheckResult"]]) -> Table:
    """A table with a row a check and a column a strategy, its name written downwards, and a mark in each."""
    from .contract import CHECKS, label

    table = Table("", *("\n".join(name) for name in results), box=None, pad_edge=False, padding=(0, 1, 0, 0))
    marks = [{result.check: MARKS[result.outcome] for result in column} for column in results.values()]
    for check in CHECKS:
        table.add_row(label(check), *(column.get(check.__name__, "") for column in marks))
    return table


def _print_failures(console: Console, results: Mapping[str, Sequence["CheckResult"]]) -> None:
    """Say what the marks of the table mean, and print each failure in full."""
    console.print(f"\n{', '.join(f'{mark} {outcome}' for outcome, mark in MARKS.items())}")
    for result in _with_outcome(results, "failed"):
        console.print(Text(f"{result.check}: {result.detail}"), soft_wrap=True)


def _print_diagnosis(console: Console, name: str, column: Sequence["CheckResult"]) -> None:
    """Print what is most likely to be done about a strategy, and how many checks its failure left out."""
    from .contract import CHECKS, most_likely

    if left := len(CHECKS) - len(column):
        console.print(f"{name}: the {left} checks after this failure were not run, as they would fail for it")
    if remedy := most_likely(column):
        console.print(Text(f"{name}: most likely: {remedy}"), soft_wrap=True)


def _sum_up(console: Console, results: Mapping[str, Sequence["CheckResult"]]) -> None:
    """Print how many checks ended in each outcome, and in how many seconds."""
    counts = ", ".join(f"{len(_with_outcome(results, outcome))} {outcome}" for outcome in MARKS)
    seconds = sum(result.seconds for result in chain(*results.values()))
    console.print(f"{len(results)} checked: {counts} in {seconds:.0f} s")


def _with_outcome(results: Mapping[str, Sequence["CheckResult"]], outcome: str) -> list["CheckResult"]:
    return [result for result in chain(*results.values()) if result.outcome == outcome]
