"""The embedded data: the source of Python's own standard library, which every Python carries.

The embedded default has to work offline, so both its model and its federated data come from the running interpreter's
library.  One rule keeps them apart:

* the single-file modules (``Lib/*.py``) are for pre-training;
* the packages (``asyncio``, ``email``, ``xml``, ...) are the federated data, never seen in pre-training.

Left out are tests, generated tables, demonstrations and anything that ``sys.stdlib_module_names`` does not name.  A
Python whose distributor removed some packages (``tkinter``, ``idlelib``, ``distutils``, ...) has less text.
"""

import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import chain, groupby
from pathlib import Path

ROOT = Path(sysconfig.get_path("stdlib"))

#: Folders of tests, tables and demonstrations, at any depth; the last three were single files up to Python 3.12, so
#: they were part of the pre-training.
EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "turtledemo", "pathlib", "string", "sysconfig"}

#: One file in this many is held out of each package.
HOLD_OUT = 12

#: A client has at least this many characters, roughly eight examples of 128 tokens.
SMALLEST_SHARE = 4096


@dataclass(frozen=True)
class Document:
    """A source file of a package, or the consecutive lines of one that fell to a client."""

    package: str
    path: str
    text: str


def pretraining() -> list[Path]:
    """Return the single-file modules, by name."""
    return _sources(path for path in ROOT.glob("*.py") if path.stem in sys.stdlib_module_names)


def packages() -> dict[str, list[Path]]:
    """Return the source files of each package, by name."""
    names = sorted(sys.stdlib_module_names - EXCLUDED)
    sources = {name: _sources((ROOT / name).rglob("*.py")) for name in names}
    return {name: paths for name, paths in sources.items() if paths}


def digest() -> str:
    """SHA-256 of all text of the packages, which another version of Python has another of."""
    texts = (path.relative_to(ROOT).as_posix() + "\0" + _text(path) for path in chain(*packages().values()))
    return sha256("\0".join(texts).encode()).hexdigest()


def heldout() -> list[Document]:
    """Return the files kept for evaluation: one in ``HOLD_OUT`` of every package that has three or more."""
    return list(map(_document, chain.from_iterable(map(_held, packages().values()))))


def clients(n: int) -> list[list[Document]]:
    """Share all text that is not held out among ``n`` clients of about equal size.

    The files stand in order of package and are cut into ``n`` contiguous runs, inside a file where a cut falls there.
    So the clients differ as real ones do: each has one package, a piece of one, or a few small neighbours.
    """
    documents = _training_documents()
    total = sum(len(document.text) for document in documents)
    most = total // SMALLEST_SHARE
    if not 1 <= n <= most:
        raise ValueError(f"the standard library has text for 1 to {most} clients, so it cannot be shared among {n}.")
    shares: list[list[Document]] = [[] for _ in range(n)]
    start = 0
    for document in documents:
        for share, text in _cut(document.text, start, total / n):
            shares[share].append(Document(document.package, document.path, text))
        start += len(document.text)
    return shares


def _training_documents() -> list[Document]:
    """Return the files of all packages that are not held out."""
    held = set(heldout())
    documents = map(_document, chain.from_iterable(packages().values()))
    return [document for document in documents if document not in held]


def _cut(text: str, start: int, size: float) -> list[tuple[int, str]]:
    """Cut a text that begins ``start`` characters into the whole where shares of ``size`` meet, between two lines."""
    placed: list[tuple[int, str]] = []
    for line in text.splitlines(keepends=True):
        placed.append((int(start / size), line))
        start += len(line)
    return [(share, "".join(line for _, line in run)) for share, run in groupby(placed, key=lambda item: item[0])]


def _held(paths: list[Path]) -> list[Path]:
    """Choose the held-out files of one package: every ``HOLD_OUT``-th in order of size, so that none dominates."""
    if len(paths) < 3:
        return []
    by_size = sorted(paths, key=lambda path: (path.stat().st_size, path.as_posix()))
    return by_size[min(len(paths), HOLD_OUT) // 2 :: HOLD_OUT]


def _document(path: Path) -> Document:
    relative = path.relative_to(ROOT)
    return Document(relative.parts[0], relative.as_posix(), _text(path))


def _sources(paths: Iterable[Path]) -> list[Path]:
    """Keep the files that are code and have text, in an order that does not depend on the file system."""
    kept = [path for path in paths if EXCLUDED.isdisjoint(path.relative_to(ROOT).parts) and _text(path)]
    return sorted(kept, key=lambda path: path.relative_to(ROOT).as_posix())


@cache
def _text(path: Path) -> str:
    """Read a file; one that cannot be read as UTF-8 counts as empty."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
