"""Rows of a table, whatever holds them: selected, joined, read by column."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from fedlora.errors import DataError, nearest

Rows = Sequence[Mapping[str, Any]]  # a list of dicts, or a datasets.Dataset


def take(rows: Rows, which: Sequence[int]) -> Rows:
    """The rows with these numbers, in the order asked for."""
    dataset: Any = rows
    chosen: Rows = dataset.select(which) if hasattr(rows, "select") else [rows[i] for i in which]
    return chosen


def stride(count: int, limit: int) -> int:
    """Every how many things of a count one is taken, so that at most `limit` are, evenly spread; 0: no limit."""
    return max(1, ceil(count / limit)) if limit else 1


def pool(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts."""
    if len(parts) == 1:
        return parts[0]
    if all(hasattr(rows, "select") for rows in parts) and len({str(getattr(r, "features", "")) for r in parts}) == 1:
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


def row_hashes(rows: Rows, columns: Sequence[str]) -> Iterator[bytes]:
    """A hash of every row's values in these columns. It says nothing of the row's place, and has no key."""
    return (
        sha256(repr([_content(row.get(c)) for c in columns]).encode()).digest() for row in _undecoded(rows, columns)
    )


def undecoded(rows: Rows) -> Rows:
    """The rows with images as the bytes or files that they are stored in, if it is a table that would decode them."""
    if not _has_features(rows):
        return rows
    from datasets import Image

    table: Any = rows
    for name in (c for c in table.column_names if isinstance(table.features[c], Image)):
        table = table.cast_column(name, Image(decode=False))
    stored: Rows = table
    return stored


def _undecoded(rows: Rows, columns: Sequence[str]) -> Rows:
    """The rows with these columns alone, and with images as they are stored, if it is a table."""
    table: Any = rows
    chosen: Rows = table.select_columns([c for c in columns if c in table.features]) if _has_features(rows) else rows
    return undecoded(chosen)


def _has_features(rows: Rows) -> bool:
    return bool(getattr(rows, "features", None))


def _content(value: Any) -> Any:
    """A value as text, numbers and hashes; of an image its pixels, or the file's bytes."""
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:  # an image that is not decoded
        return sha256(value["bytes"] or Path(value["path"]).read_bytes()).hexdigest()
    if isinstance(value, Mapping):
        return [(key, _content(value[key])) for key in sorted(value)]
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if hasattr(value, "tobytes"):
        return sha256(value.tobytes()).hexdigest()
    if isinstance(value, list | tuple):
        return [_content(v) for v in value]
    return value
