"""The rows of one file, and the place in it where each row stands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .rows import Rows, column, column_names, take


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one file, and the lines on which they begin."""

    name: str
    rows: Rows
    lines: Sequence[int] = ()  # none for files that have no lines
    warnings: tuple[str, ...] = ()  # of what its reader found odd, a sentence each

    def location(self, row: int) -> str:
        """The place of a row in the words of an error: the file's name, and line or row."""
        return f"{self.name} line {self.lines[row]}" if self.lines else f"{self.name} row {row + 1}"

    def only(self, which: Sequence[int]) -> "Table":
        """The table with the rows of these numbers alone, each with the line on which it begins."""
        lines = [self.lines[i] for i in which] if self.lines else ()
        return replace(self, rows=take(self.rows, which), lines=lines)

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in their order."""
        return column_names(self.rows)

    def first_value(self, name: str) -> Any:
        """The first value of a column that is neither null nor empty; null for none, or without this column."""
        values = column(self.rows, name) if name in self.columns else ()
        return next((value for value in values if value is not None and value != ""), None)
