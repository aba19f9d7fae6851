"""A verdict on each published number: what was measured here, and whether it agrees."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedlora.comparison.statistics import Interval
from fedlora.comparison.table import Row

from .catalogue import PublishedCell, Reproduction

Outcome = Literal["agrees", "differs", "open", "not comparable", "not run"]
MEANING: dict[Outcome, str] = {
    "agrees": "the mean is within the tolerance of the published number",
    "differs": "the whole 95 % interval is out of the tolerance",
    "open": "the mean is out of the tolerance; its interval reaches into it, or is of one seed: more seeds tell",
    "not comparable": "settings differ from the paper's, as is said above; the numbers stand side by side, no more",
    "not run": "there is no result yet",
}


@dataclass(frozen=True)
class CellVerdict:
    """What became of one published number."""

    cell: PublishedCell
    outcome: Outcome
    measured: Interval | None

    def record(self) -> dict[str, Any]:
        """The verdict as JSON holds it."""
        return {**asdict(self.cell), "outcome": self.outcome, "measured": self.measured and self.measured._asdict()}

    def words(self) -> str:
        """The verdict as a line."""
        cell, here = self.cell, self.measured
        half = f" ± {here.half:.4f}" if here and here.half is not None else ""
        said = f"{here.mean:.4f}{half} here" if here else "-"
        return f"{cell.case}, {cell.line}: {cell.value:.4f} published (± {cell.tolerance:g}), {said}: {self.outcome}"


def verdicts(made: Reproduction, rows: Sequence[Row]) -> Iterator[CellVerdict]:
    """Yield the verdict on every published number, by the rows of the comparison."""
    found = {(row.line, row.case): row for row in rows}
    for cell in made.published:
        measured = found[cell.line, cell.case].figures.get(cell.figure)
        yield CellVerdict(cell, _outcome(cell, measured, is_alike=not made.differs), measured)


def _outcome(cell: PublishedCell, measured: Interval | None, *, is_alike: bool) -> Outcome:
    if measured is None:
        return "not run"
    if not is_alike:
        return "not comparable"
    gap = abs(measured.mean - cell.value)
    if gap <= cell.tolerance:
        return "agrees"
    return "open" if measured.half is None or gap <= cell.tolerance + measured.half else "differs"
