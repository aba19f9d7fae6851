"""Rows of a table, whatever holds them: selected, joined, read by column."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from fedlora.errors import DataError, nearest

Rows = Sequence[Mapping[str, Any]]  # a list of dicts, or a datasets.Dataset


def take(rows: Rows, which: Sequence[int]) -> Rows:
    """The rows with these numbers, in the order asked for."""
    dataset: Any = rows
    chosen: Rows = dataset.select(which) if hasattr(rows, "select") else [rows[i] for i in which]
    return chosen


def pool(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts."""
    if len(parts) == 1:
        return parts[0]
    if all(hasattr(rows, "select") for rows in parts):
        from datasets import concatenate_datasets

        joined: Rows = concatenate_datasets(list(parts))
        return joined
    return list(chain.from_iterable(parts))


def column_names(rows: Rows) -> list[str]:
    """The names of the columns, in their order; of plain rows, all that occur."""
    return list(getattr(rows, "column_names", None) or dict.fromkeys(chain.from_iterable(rows)))


def column(rows: Rows, name: str) -> list[Any]:
    """The values of one column; raises `DataError` with the nearest name if there is no such column."""
    names = column_names(rows)
    if name not in names:
        raise DataError(f'no column "{name}"; {nearest(name, names)}')
    dataset: Any = rows
    return list(dataset[name]) if hasattr(rows, "column_names") else [row.get(name) for row in rows]
