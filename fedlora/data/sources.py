"""Rows from files, from a folder, or from the hub, and where in them each stands."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from glob import has_magic
from pathlib import Path
from typing import Any

from fedlora.errors import DataError, nearest

from .rows import Rows, take

HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one file, and where they stand in it."""

    name: str
    rows: Rows
    lines: Sequence[int] = ()

    def place(self, row: int) -> str:
        """Where a row is, in the words of an error."""
        return f"{self.name} line {self.lines[row]}" if self.lines else f"{self.name} row {row + 1}"

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in their order."""
        return list(getattr(self.rows, "column_names", None) or dict.fromkeys(k for row in self.rows for k in row))


def tables(spec: str, limit: int) -> list[Table]:
    """The data that a path names, one table a file, none of them empty."""
    found = _read(spec)
    for table in found:
        if not len(table.rows):
            raise DataError(f"{table.name} has no examples; give it some, or leave it out")
    return [replace(t, rows=take(t.rows, range(min(limit, len(t.rows))))) for t in found] if limit else found


def _read(spec: str) -> list[Table]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [_file(path)]
    where, _, part = spec.rpartition(":") if ":" in spec else (spec, "", "train")
    folder = Path(where).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return [_saved(folder, part)]
    if path.is_dir():
        return _files(spec, (p for p in path.iterdir() if p.suffix.lower() in READERS and p.name[0] != "."))
    if has_magic(spec):
        return _files(spec, Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if HUB.fullmatch(where) and path.suffix not in READERS:
        return [_hub(where, part)]
    close = get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    raise DataError(f"{spec}: there is no such file or folder" + (f'; did you mean "{close[0]}"?' if close else ""))


def _files(spec: str, paths: Iterable[Path]) -> list[Table]:
    files = sorted((path for path in paths if path.is_file()), key=_natural)
    if not files:
        raise DataError(f"{spec} holds no data; it takes files that end in {', '.join(READERS)}")
    return [_file(path) for path in files]


def _natural(path: Path) -> list[Any]:
    """A key by which client_10 follows client_9."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", str(path))]


def _file(path: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: what kind of file this is its name does not say; known are {', '.join(READERS)}")
    return reader(path)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 ({e.reason}); save the file as UTF-8") from e


def _jsonl(path: Path) -> Table:
    rows, lines = [], []
    for n, line in enumerate(_text(path).split("\n"), 1):  # splitlines would also cut at the likes of U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise DataError(f"{path} line {n}: not JSON ({e.msg} at column {e.colno})") from e
            lines.append(n)
    return _objects(Table(str(path), rows, lines))


def _json(path: Path) -> Table:
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _jsonl(path)
    try:
        return _objects(Table(str(path), json.loads(text)))
    except json.JSONDecodeError as e:
        raise DataError(f"{path} line {e.lineno}: not JSON ({e.msg} at column {e.colno})") from e


def _objects(table: Table) -> Table:
    for i, row in enumerate(table.rows):
        if not isinstance(row, dict):
            raise DataError(f"{table.place(i)}: a {type(row).__name__}, and not an object with columns")
    return table


def _csv(path: Path) -> Table:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    records, lines, start = [], [], 1
    try:
        for fields in reader:
            if fields:
                records.append(fields)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as e:
        raise DataError(f"{path} line {start}: not CSV ({e})") from e
    header = records[0] if records else []
    if len(set(header)) < len(header):
        raise DataError(f"{path} line 1: two columns have the same name: {', '.join(header)}")
    for fields, line in zip(records, lines, strict=True):
        if len(fields) != len(header):
            raise DataError(f"{path} line {line}: {len(fields)} fields under a header of {len(header)}; quote commas")
    return Table(str(path), [dict(zip(header, fields, strict=True)) for fields in records[1:]], lines[1:])


def _parquet(path: Path) -> Table:
    from datasets import Dataset
    from pyarrow import parquet

    try:
        return Table(str(path), Dataset(parquet.read_table(path)))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read as Parquet: {e}") from e


def _saved(folder: Path, part: str) -> Table:
    from datasets import load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError) as e:
        raise DataError(f"{folder} cannot be read as a saved dataset: {e}") from e
    if isinstance(found, dict) and part not in found:
        raise DataError(f'{folder} has no split "{part}"; {nearest(part, found)}')
    return Table(str(folder), found[part] if isinstance(found, dict) else found)


def _hub(name: str, part: str) -> Table:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:  # asked first, because load_dataset tries again for half a minute
            HfApi().dataset_info(name, timeout=10)
        return Table(f"{name}:{part}", load_dataset(name, split=part))
    except Exception as e:  # the network, the hub and the builder each have their own kinds
        said = str(e).strip().partition("\n")[0]
        raise DataError(f"{name} is no file or folder here, and could not be had as a hub id: {said}") from e


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
