"""The event log that server and client each keep in `audit.jsonl`: what left and what entered, a JSON object a line.

    {"at": "2026-01-31T12:00:00.123Z", "side": "client", "event": "left", "what": "update", "bytes": 1024, ...}

Lines are whole whatever happens. Each is one write to a file that is locked meanwhile, so that the lines of several
processes do not mix. Where a crash cut a line short, the next writer ends that line before its own.
"""

import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from errno import EAGAIN
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

from filelock import lock_descriptor, unlock_descriptor

from fedlora.errors import ConfigError
from fedlora.log_lines import escaped

from .files import append_line

TEXT = 500  # characters that are kept of a text
ENTRIES = 2000  # entries that are kept of a list or a dict
DEPTH = 8  # lists within lists that are kept
KEPT = 3  # full files that are kept, the newest with the ending .1
PATIENCE = 5.0  # seconds that a writer waits for the lock
log = logging.getLogger("fedlora")


class EventLog:
    """A log that appends to one file, which only its owner can read; several processes may share the file."""

    def __init__(
        self, path: Path | None, limit: int = 64 * 2**20, names: Mapping[int, str] | None = None, **fixed: object
    ) -> None:
        """Put `fixed` into every line, and begin a new file past `limit` bytes. Without a path nothing is kept.

        A line about a client whose number is in `names` gets the client's name too, which its number alone does not
        tell once the client was removed.
        Raises `ConfigError` where the file cannot be opened.
        """
        self._path, self._limit, self._names, self._fixed = path, limit, names or {}, fixed
        self._lost = 0  # lines that could not be written since the last one that could
        try:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(_open(path))
        except OSError as e:
            raise ConfigError(f"the audit log {path} cannot be written: {e.strerror}; choose another place") from e

    def write(self, event: str, /, **fields: object) -> None:
        """Append a line about an event; when this returns, the line is on the disk.

        A disk that cannot be written raises nothing: it would end a run of days for the sake of a log, after clients
        have trained and been charged, and the line would be missing all the same. The gap is not hidden: logging says
        it once, and the next line that can be written holds in `lost` how many lines are missing before it.
        """
        if not self._path:
            return
        gap = {"lost": self._lost} if self._lost else {}
        named = {"at": utc_timestamp(time.time()), "event": event}
        client = fields.get("client")
        name = {"name": self._names[client]} if isinstance(client, int) and client in self._names else {}
        values = {"at": "", **self._fixed, "event": "", **fields, **name, **gap} | named
        line = json.dumps(sanitised(values), ensure_ascii=False).encode() + b"\n"
        try:
            self._append(self._path, line)
            self._lost = 0
        except OSError as e:
            if not self._lost:
                log.error("the audit log %s has a gap from now on: %s; make room, the run goes on", self._path, e)
            self._lost += 1

    def _append(self, path: Path, line: bytes) -> None:
        with _locked(path) as descriptor:
            size = os.fstat(descriptor).st_size
            is_full = size > 0 and size + len(line) > self._limit
            if is_full:
                _rotate(path)
            else:
                append_line(descriptor, line)
                unlock_descriptor(descriptor)  # the next writer need not wait for the disk
                os.fsync(descriptor)
        if is_full:
            self._append(path, line)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries that are kept of an event log, the oldest first, without lines that a crash cut short."""
    for n in range(KEPT, -1, -1):
        file = _older(path, n)
        for line in file.read_bytes().splitlines() if file.exists() else ():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry


def utc_timestamp(seconds: float) -> str:
    """A time, in seconds since 1970, as text in UTC with milliseconds: `2026-01-31T12:00:00.123Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def sanitised(value: object, depth: int = 0) -> object:
    """The value in a form that JSON can hold and a terminal can show, of bounded size; what is cut off is counted.

    >>> sanitised({"why": "a\\x1b[2J", "loss": float("nan")})
    {'why': 'a\\\\x1b[2J', 'loss': 'nan'}
    """
    if value is None or isinstance(value, bool | int | float):
        return _number(value)
    if depth == DEPTH:
        return _text(str(value))
    if isinstance(value, Mapping):
        return _mapping(value, depth + 1)
    if isinstance(value, list | tuple | set | frozenset):
        return _items(value, depth + 1)
    return _text(str(value))


def _number(value: bool | int | float | None) -> object:
    """The number, or text for one that strict JSON does not know or that other programs cannot read."""
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        return _text(hex(value))
    return value


def _mapping(values: Mapping[Any, object], depth: int) -> dict[str, object]:
    kept = {_text(str(key)): sanitised(values[key], depth) for key in islice(values, ENTRIES)}
    return kept | {"...": _more(values)} if len(values) > ENTRIES else kept


def _items(values: Collection[object], depth: int) -> list[object]:
    kept = [sanitised(value, depth) for value in islice(values, ENTRIES)]
    return [*kept, _more(values)] if len(values) > ENTRIES else kept


def _more(values: Sized) -> str:
    return f"... and {len(values) - ENTRIES} more"


def _text(text: str) -> str:
    """The text in one line, cut short."""
    more = len(text) - TEXT
    shown = escaped(text[:TEXT])
    return f"{shown}... and {more} more characters" if more > 0 else shown


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open the file for one line and lock it; begin anew if another process rotated the file before the lock came."""
    until = time.monotonic() + PATIENCE
    while True:
        descriptor = _open(path)
        try:
            _lock(descriptor, until)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, until: float) -> None:
    """Raises `BlockingIOError` when time is up: a process that hangs with the lock must not hang the others."""
    while not lock_descriptor(descriptor, blocking=False):
        if time.monotonic() > until:
            raise BlockingIOError(EAGAIN, "another process holds it")
        time.sleep(0.002)


def _rotate(path: Path) -> None:
    """Rename the file to .1, after .1 has become .2 and so on; the oldest is dropped."""
    for n in range(KEPT, 0, -1):
        if (before := _older(path, n - 1)).exists():
            before.replace(_older(path, n))


def _older(path: Path, n: int) -> Path:
    return path.with_name(f"{path.name}.{n}") if n else path
