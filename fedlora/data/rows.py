"""Rows of a table, whatever holds them: selected, joined, read by column."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.errors import DataError, nearest

Rows = Sequence[Mapping[str, Any]]  # a list of dicts, or a datasets.Dataset


def take(rows: Rows, which: Sequence[int]) -> Rows:
    """Some of the rows, in the order asked for."""
    dataset: Any = rows
    some: Rows = dataset.select(which) if hasattr(rows, "select") else [rows[i] for i in which]
    return some


def pool(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts."""
    if len(parts) == 1:
        return parts[0]
    if all(hasattr(rows, "select") for rows in parts):
        from datasets import concatenate_datasets

        joined: Rows = concatenate_datasets(list(parts))
        return joined
    return [row for rows in parts for row in rows]


def column(rows: Rows, name: str) -> list[Any]:
    """One column; raises `DataError` with the nearest name where there is none."""
    known = getattr(rows, "column_names", None) or list(dict.fromkeys(key for row in rows for key in row))
    if name not in known:
        raise DataError(f'no column "{name}"; {nearest(name, known)}')
    dataset: Any = rows
    return list(dataset[name]) if hasattr(rows, "column_names") else [row.get(name) for row in rows]
