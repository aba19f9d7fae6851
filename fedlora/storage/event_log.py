"""The audit log that server and client each keep: what left and what entered, one JSON object a line.

    {"at": "2026-01-31T12:00:00.123Z", "side": "client", "event": "left", "what": "update", "bytes": 1024, ...}

Lines are whole whatever happens: each is one write to a file that is locked meanwhile, so that those of several
processes do not mix; the rest of a line that a crash cut short is closed off by the next one.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from errno import EAGAIN
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

from filelock import lock_descriptor, unlock_descriptor

from fedlora.errors import ConfigError

from .files import append_line

TEXT, ENTRIES, DEPTH = 500, 2000, 8  # characters of a text, entries of a list, lists within lists
KEPT = 3  # files that are full, the newest of which is .1
PATIENCE = 5.0  # seconds that a line waits for other processes' lines
log = logging.getLogger("fedlora")


class EventLog:
    """Appends to one file, which its owner alone can read; several processes may share it."""

    def __init__(self, path: Path | None, limit: int = 64 * 2**20, **fixed: object) -> None:
        """Every line has `fixed` too. Past `limit` bytes a new file is begun. No path: nothing is kept.

        Raises `ConfigError` where the file cannot be opened.
        """
        self._path, self._limit, self._fixed, self._lost = path, limit, fixed, 0
        try:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(_open(path))
        except OSError as e:
            raise ConfigError(f"the audit log {path} cannot be written: {e.strerror}; choose another place") from e

    def write(self, event: str, /, **fields: object) -> None:
        """One line, on the disk before this returns.

        It never raises: a full disk would else end a run of days for the sake of a log, after clients have trained and
        been charged, and the line would be missing all the same. The gap is not hidden: it is said once through
        logging, and the next line that can be written has in `lost` how many are missing before it.
        """
        if not self._path:
            return
        gap = {"lost": self._lost} if self._lost else {}
        named = {"at": utc_timestamp(time.time()), "event": event}
        values = {"at": "", **self._fixed, "event": "", **fields, **gap} | named
        line = json.dumps(sanitised(values), ensure_ascii=False).encode() + b"\n"
        try:
            self._append(self._path, line)
            self._lost = 0
        except OSError as e:
            if not self._lost:
                log.error("the audit log %s has a gap from now on: %s; make room, the run goes on", self._path, e)
            self._lost += 1

    def _append(self, path: Path, line: bytes) -> None:
        with _locked(path) as handle:
            size = os.fstat(handle).st_size
            full = size > 0 and size + len(line) > self._limit
            if full:
                _rotate(path)
            else:
                append_line(handle, line)
                unlock_descriptor(handle)  # the next writer need not wait for the disk
                os.fsync(handle)
        if full:
            self._append(path, line)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """All that is kept of a journal, the oldest first, without lines that a crash cut short."""
    for file in [*(_older(path, n) for n in range(KEPT, 0, -1)), path]:
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry


def utc_timestamp(seconds: float) -> str:
    """A time as UTC with milliseconds: `2026-01-31T12:00:00.123Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def sanitised(value: object, depth: int = 0) -> object:
    """A value that JSON can hold and a terminal can show, of bounded size; what is cut off is counted.

    >>> harmless({"why": "a\\x1b[2J", "loss": float("nan")})
    {'why': 'a\\\\x1b[2J', 'loss': 'nan'}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else _text(hex(value))
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset) and depth < DEPTH:
        some, more = list(islice(value, ENTRIES)), max(0, len(value) - ENTRIES)
        rest = f"... and {more} more"
        if isinstance(value, Mapping):
            return {_text(str(k)): sanitised(value[k], depth + 1) for k in some} | ({"...": rest} if more else {})
        return [sanitised(v, depth + 1) for v in some] + ([rest] if more else [])
    return _text(str(value))


def _text(text: str) -> str:
    """No line breaks, escape sequences, or characters that turn the writing around: each as Python would write it."""
    more = len(text) - TEXT
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:TEXT])
    return f"{shown}... and {more} more characters" if more > 0 else shown


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, opened for one line and locked; the one that has the name once the lock is there."""
    until = time.monotonic() + PATIENCE
    while True:
        handle = _open(path)
        try:
            _lock(handle, until)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):  # nobody rotated it meanwhile
                yield handle
                return
        finally:
            os.close(handle)


def _lock(handle: int, until: float) -> None:
    """Raises `BlockingIOError` when time is up: a process that hangs with the lock must not hang the others."""
    while not lock_descriptor(handle, blocking=False):
        if time.monotonic() > until:
            raise BlockingIOError(EAGAIN, "another process holds it")
        time.sleep(0.002)


def _rotate(path: Path) -> None:
    """Give the file the name .1, after those before it have moved on; the oldest goes."""
    for n in range(KEPT, 0, -1):
        if (before := _older(path, n - 1)).exists():
            before.replace(_older(path, n))


def _older(path: Path, n: int) -> Path:
    return path.with_name(f"{path.name}.{n}") if n else path
