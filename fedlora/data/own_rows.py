"""Rows that a caller holds in memory, written as files that a run reads like any other, and finds when it goes on."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, DataError, cut

PART = re.compile(r"\w[\w .-]{0,99}")  # a client's name, which is its file's


def is_table(value: Any) -> bool:
    """Is this one table of rows: a list of mappings, a DataFrame, or a `datasets.Dataset`?"""
    if isinstance(value, str | Mapping):
        return False
    if isinstance(value, Sequence) and len(value):
        return all(isinstance(row, Mapping) for row in value)
    return hasattr(value, "to_parquet") and (hasattr(value, "columns") or hasattr(value, "select"))


def is_rows(value: Any) -> bool:
    """Is this a table of rows, or a list of such or a mapping from names to such, one a client?"""
    parts = list(value.values()) if isinstance(value, Mapping) else value
    several = not isinstance(parts, str) and isinstance(parts, Sequence) and len(parts) > 0
    return is_table(value) or (several and all(map(is_table, parts)))


def write_rows(rows: Any, folder: Path, name: str) -> Path:
    """Write rows as Parquet, for their owner's eyes alone; return the file, or of several clients the folder of theirs.

    A list's clients are numbered in its order, a mapping's in the order of their names. Raises `DataError` for values
    that are of no one type, or a name that is no file's; `ConfigError` for a dataset with splits.
    """
    if type(rows).__name__ in ("DatasetDict", "IterableDatasetDict"):
        raise ConfigError(f"the dataset has splits, {', '.join(rows)}: give one of them, and another as eval_data")
    if is_table(rows):
        return _written(rows, folder / f"{name}.parquet")
    named = rows if isinstance(rows, Mapping) else {f"client_{i}": part for i, part in enumerate(rows)}
    for client in named:
        if not PART.fullmatch(str(client)):
            raise DataError(
                f'a client called "{cut(str(client), 40)}": its name is that of a file; take letters and digits'
            )
    for client, part in named.items():
        _written(part, folder / name / f"{client}.parquet")
    return folder / name


def _written(table: Any, path: Path) -> Path:
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        disable_progress_bars()
        _dataset(table).to_parquet(str(path))
    except (ValueError, TypeError, OverflowError) as e:  # of pyarrow
        raise DataError(f"{path.stem}: its rows cannot be kept as a table: {cut(str(e), 200)}") from e
    finally:
        if shown:
            enable_progress_bars()
    path.chmod(0o600)
    return path


def _dataset(table: Any) -> Any:
    from datasets import Dataset

    if isinstance(table, Dataset):
        return table
    if hasattr(table, "columns"):
        return Dataset.from_pandas(table, preserve_index=False)
    names = dict.fromkeys(chain.from_iterable(table))  # of all rows, as some may lack a column
    return Dataset.from_dict({name: [row.get(name) for row in table] for name in names})
