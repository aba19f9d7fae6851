"""Tables read from files, from a folder, from a saved dataset or from the hub."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from fedlora.errors import DataError, cut, nearest

from .guesses import PICTURES
from .rows import take, undecoded
from .tables import Table as Table
from .text_files import read_csv, read_json, read_jsonl, read_tsv

ABOUT = {"dataset_infos.json", "dataset_info.json"}  # what datasets writes of data, beside them
MOST_LOOKED_AT = 1000  # files of a folder without data
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_tables(spec: str, limit: int) -> list[Table]:
    """The data that `spec` names, one table a file, with the first `limit` rows of each (0: all).

    `spec` is a file, a folder of files, a pattern as `data/client_*.jsonl`, or FOLDER[:SPLIT] of a saved dataset or
    NAME[:SPLIT] of one on the hub. Raises `DataError` for what cannot be read, and for a file without examples.
    """
    found = [replace(table, rows=undecoded(table.rows)) for table in _read(spec)]
    for table in found:
        if not len(table.rows):
            raise DataError(f"{table.name} has no examples; give it some, or leave it out")
    return [_first_rows(table, limit) for table in found] if limit else found


def data_files(spec: str) -> list[Path]:
    """The files that `read_tables` reads; none for an empty `spec`, and for a dataset on the hub."""
    path, folder = Path(spec).expanduser(), Path(_name_and_split(spec)[0]).expanduser()
    if not spec or path.is_file():
        return [path] if spec else []
    if _is_saved_dataset(folder):
        inside = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("cache-"))
        return sorted(inside)  # what begins so was computed from the others
    return _in_folder(path) if path.is_dir() else _matching(spec)


def hub_name(spec: str) -> str:
    """The name of the dataset on the hub that `read_tables` reads; empty for files, which are nobody else's to know."""
    name, _ = _name_and_split(spec)
    is_here = Path(name).expanduser().exists() or Path(spec).suffix in READERS
    return name if HUB.fullmatch(name) and not is_here else ""


def _in_folder(path: Path) -> list[Path]:
    return _sorted(filter(_is_data_file, path.iterdir()))


def _matching(spec: str) -> list[Path]:
    """The files that match a pattern; none for what is no pattern."""
    path = Path(spec).expanduser()
    return _sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if has_magic(spec) else []


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(filter(Path.is_file, paths), key=_natural)


def _first_rows(table: Table, limit: int) -> Table:
    return replace(table, rows=take(table.rows, range(min(limit, len(table.rows)))))


def _read(spec: str) -> list[Table]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [_file(path)]
    name, part = _name_and_split(spec)
    folder = Path(name).expanduser()
    if _is_saved_dataset(folder):
        return [_saved(folder, part)]
    if path.is_dir():
        return _files(spec, _in_folder(path))
    if has_magic(spec):
        return _files(spec, _matching(spec))
    if HUB.fullmatch(name) and path.suffix not in READERS:
        return [_hub(name, part)]
    close = get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    raise DataError(f"{spec}: there is no such file or folder{hint}")


def _name_and_split(spec: str) -> tuple[str, str]:
    """The name of a dataset and its split, which stands behind a colon; without one it is "train"."""
    name, colon, part = spec.rpartition(":")
    return (name, part) if colon else (spec, "train")


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _is_data_file(path: Path) -> bool:
    return path.suffix.lower() in READERS and not path.name.startswith(".") and path.name not in ABOUT


def _files(spec: str, files: Sequence[Path]) -> list[Table]:
    if not files:
        raise DataError(f"{spec} holds no data; it takes files that end in {', '.join(READERS)}{_images_hint(spec)}")
    return [_file(path) for path in files]


def _images_hint(spec: str) -> str:
    """The remedy for a folder of images, as words to follow a sentence; empty for any other."""
    folder = Path(spec).expanduser()
    inside = islice(folder.rglob("*"), MOST_LOOKED_AT) if folder.is_dir() else ()
    if not any(path.suffix.lower() in PICTURES for path in inside):
        return ""
    return "; of images write such a file, with a column image of their names and a column label"


def _natural(path: Path) -> list[Any]:
    """A sort key with which client_10 follows client_9."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", str(path))]


def _file(path: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: what kind of file this is its name does not say; known are {', '.join(READERS)}")
    return reader(path)


def _parquet(path: Path) -> Table:
    from datasets import Dataset
    from pyarrow import parquet

    try:
        return Table(str(path), Dataset(parquet.read_table(path)))
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as e:  # of pyarrow, and of datasets
        raise DataError(f"{path} cannot be read as Parquet: {cut(str(e), 200)}") from e


def _saved(folder: Path, part: str) -> Table:
    from datasets import load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as e:
        raise DataError(f"{folder} cannot be read as a saved dataset: {cut(str(e), 200)}") from e
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
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": _parquet,
}
