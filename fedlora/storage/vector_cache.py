"""Vectors of whole numbers, kept between runs under the hash of what they were computed from.

They lie one after another in one file, which is memory-mapped; an index says where. Several processes may read and add
at once. What is kept can be computed again, so it may be deleted at any time, nothing waits for the disk, and what a
crash of the machine has damaged is not found: every vector has a checksum over its key and its numbers.

    vectors.i32     int32 numbers
    index.sqlite    key -> where its vector begins, how long it is, its checksum

Both are their owner's alone (0600, in a folder of 0700).
"""

import mmap
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from threading import RLock
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Place = tuple[int, int]  # of a vector in the file: where it begins, and its length
FAILURES = (sqlite3.Error, OSError)  # of a disk that is full, read-only or damaged
INDEX, VECTORS = "index.sqlite", "vectors.i32"
WAIT = 60.0  # seconds for another process that is adding
TABLE = "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, start INT, size INT, sum INT) WITHOUT ROWID"


class MappedNumbers:
    """The numbers of an open file, of which more is mapped as it grows."""

    def __init__(self, file: int) -> None:
        self._file, self._mapped = file, np.zeros(0, np.int32)

    def __del__(self) -> None:
        os.close(self._file)

    def __getitem__(self, where: slice) -> Ints:
        """The numbers at these places, as far as there are any."""
        if where.stop > len(self._mapped) and (count := self.count()):
            self._mapped = np.frombuffer(mmap.mmap(self._file, 4 * count, access=mmap.ACCESS_READ), np.int32)
        return self._mapped[where]

    def count(self) -> int:
        """How many whole numbers the file has."""
        return os.fstat(self._file).st_size // 4

    def append(self, content: bytes) -> int:
        """Write at the end of the file; return the place of the first number. Only one process may do so at a time."""
        start = self.count()  # over what a crash has left of a number
        at = 4 * start
        while content:
            written = os.pwrite(self._file, content, at)
            at, content = at + written, content[written:]
        return start


class VectorCache:
    """The vectors that are kept in one folder, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises `FAILURES`."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.numbers = MappedNumbers(_owned(folder / VECTORS))
        os.close(_owned(folder / INDEX))
        self._index = sqlite3.connect(folder / INDEX, timeout=WAIT, isolation_level=None, check_same_thread=False)
        self._lock = RLock()  # of threads; between processes the index has its own
        self._index.execute("PRAGMA synchronous = OFF")
        self._index.execute(TABLE)
        os.utime(folder / VECTORS)  # by which `trim` knows what is in use

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Place]:
        """Where the vectors of these keys lie, as far as they are there and undamaged. Raises `FAILURES`."""
        found: dict[bytes, Place] = {}
        with self._lock:
            for key in keys:
                row = self._index.execute("SELECT start, size, sum FROM vectors WHERE key = ?", (key,)).fetchone()
                if row and _checksum(key, self.numbers[row[0] : row[0] + row[1]]) == row[2]:
                    found[key] = row[0], row[1]
        return found

    def add(self, vectors: Mapping[bytes, Ints]) -> dict[bytes, Place]:
        """Keep vectors under their keys; return where they lie. Raises `FAILURES`, and then none of them is found."""
        with self._lock, self._alone():
            start, places = self.numbers.append(b"".join(v.tobytes() for v in vectors.values())), {}
            for key, vector in vectors.items():
                places[key] = start, len(vector)
                start += len(vector)
            rows = [(key, *places[key], _checksum(key, vector)) for key, vector in vectors.items()]
            self._index.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", rows)
        return places

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Within the block no other process adds."""
        self._index.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._index.execute("ROLLBACK")
            raise
        self._index.execute("COMMIT")


def trim(folder: Path, most: int) -> None:
    """Remove the caches in a folder that were least recently opened, until those left have `most` bytes.

    Processes that have one open go on with it.
    """
    newest_first = sorted(folder.glob(f"*/{VECTORS}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for n, path in enumerate(newest_first):
        total += sum(file.stat().st_size for file in path.parent.iterdir())
        if total > most and n:  # the newest may be as large as it is
            rmtree(path.parent, ignore_errors=True)


def _owned(path: Path) -> int:
    """A descriptor of a file for reading and writing, made where it is missing, which nobody else may read."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _checksum(key: bytes, vector: Ints) -> int:
    return crc32(vector.tobytes(), crc32(key))
