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


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The items of all parts, one after another."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def item(i: int) -> T:
        part = int(np.searchsorted(ends, i, side="right"))
        return parts[part][i - int(ends[part])]  # counted from the part's end

    return Lazy(int(ends[-1]) if len(ends) else 0, item)


def examples_of(rows: Sequence[EncodedRow]) -> Sequence[Example]:
    """The examples of all rows, one after another."""
    return joined(Lazy(len(rows), lambda i: rows[i].examples))
