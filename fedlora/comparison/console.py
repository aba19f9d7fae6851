"""What a person sees of a comparison: a line for each run that ends, and on a terminal how far the others are."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.status import Status

from .formats import by_case, cells, metrics
from .results import Results
from .schedule import ComparisonRun
from .table import Row
from .workers import Workers

WIDTH = 200
LEGEND = """\
Means over seeds ± half of a 95 % confidence interval; bytes are of a round, of all its clients. alone: every client by
itself; pooled: all rows in one place. Difference from a line: over seeds and examples of the test split; *: more than
chance (p < 0.05 after Holm's correction). Tuned values: *: at an end of what was tried; ?: still being tuned."""


class ComparisonProgress:
    """A `ComparisonObserver` that prints a line for each run, and on a terminal a moving one for those under way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._status: Status | None = None

    def going_on(self, workers: Workers, results: Results) -> None:
        """Show how far the runs under way are."""
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = Status("", console=self._console)
            self._status.start()
        rounds = [f"round {done} of {of}" for done, of in workers.progress.values()]
        words = f"{len(results)} runs done, {len(workers.under_way)} under way: {', '.join(rounds) or 'loading'}"
        self._status.update(f"{words}; {(time.monotonic() - self._began) / 60:.0f} min")

    def ended(self, run: ComparisonRun, record: dict[str, Any]) -> None:
        """Print the run's line."""
        self._console.print(f"{run.words}: {outcome(record)}", markup=False, soft_wrap=True)

    def __enter__(self) -> "ComparisonProgress":
        return self

    def __exit__(self, *_: object) -> None:
        """Take the moving line away."""
        if self._status:
            self._status.stop()


def outcome(record: dict[str, Any]) -> str:
    """What came of a run, in one line."""
    if "error" in record:
        return str(record["error"])
    test, own = record.get("test", {}).get("values", {}), record.get("own", {})
    parts = [f"test loss {test['loss']:.4f}"] if test else []
    parts += [f"test accuracy {test['accuracy']:.4f}"] if "accuracy" in test else []
    parts += [f"clients' own {own['metric']} {own['mean']:.4f}, worst {own['worst']:.4f}"] if own else []
    return ", ".join([*parts, f"{record['cpu']:.0f} s of CPU"])


def show_table(rows: Sequence[Row]) -> None:
    """Print the table, a part for each case; as wide as it needs to be where there is no terminal."""
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for case, part in by_case(rows).items():
        head, body = cells(part)
        table = Table(*head, title=case or None, box=None, pad_edge=False, title_justify="left")
        for line in body:
            table.add_row(*line)
        console.print(table, markup=False)
    told = metrics(rows)
    console.print("", *([told] if told else []), LEGEND, sep="\n", markup=False, soft_wrap=True)
