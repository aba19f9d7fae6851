"""Sequences whose items are made when they are asked for, so that none of them lies in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from .examples import EncodedRow, Example

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Lazy(Sequence[T], Generic[T]):
    """A sequence of so many items, each of which is made of its place, from 0, every time it is asked for."""

    size: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: Any) -> Any:
        """The item at a place, which may be counted from the end; of a slice a sequence as lazy."""
        places = range(self.size)[where]
        return self.make(places) if isinstance(places, int) else Lazy(len(places), lambda i: self.make(places[i]))


def examples_of(rows: Sequence[EncodedRow]) -> Sequence[Example]:
    """The examples of all rows, one after another."""
    ends = np.cumsum([len(row.examples) for row in rows], dtype=np.int64)

    def example(i: int) -> Example:
        row = int(np.searchsorted(ends, i, side="right"))
        return rows[row].examples[i - int(ends[row])]  # counted from the row's end

    return Lazy(int(ends[-1]) if len(ends) else 0, example)
