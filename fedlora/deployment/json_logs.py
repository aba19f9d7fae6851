"""Logs for machines: a JSON object a line, with the run, the round and the client that the line is about."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TextIO

from fedlora.errors import ConfigError
from fedlora.storage.event_log import utc_timestamp

ABOUT = ("run", "round", "client")
_about: ContextVar[Mapping[str, object]] = ContextVar("about", default={})  # noqa: B039  # it is never changed in place


@contextmanager
def log_context(run: object = None, round: int | None = None, client: int | None = None) -> Iterator[None]:
    """Mark the lines that are logged inside this `with` with a run, a round or a client.

    What is not given stays as it was outside. A new thread begins with no marks.
    """
    given = {"run": run, "round": round, "client": client}
    token = _about.set({**_about.get(), **_without_none(given)})
    try:
        yield
    finally:
        _about.reset(token)


def log_json(where: TextIO | Path, **fixed: object) -> Callable[[], None]:
    """Log as JSON lines, each with the fields in `fixed` too; the returned function ends it.

    On a stream, JSON lines take the place of the lines for people, as the two would mix; a file gets them beside those.
    logrotate may move the file away. Raises `ConfigError` where the file cannot be opened.
    """
    logger = logging.getLogger("fedlora")
    handler = _to_file(where) if isinstance(where, Path) else logging.StreamHandler(where)
    handler.setFormatter(Structured(fixed))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = propagate and isinstance(where, Path)
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)

    def close() -> None:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
        handler.close()

    return close


class Structured(logging.Formatter):
    """Formats a record as one line of JSON; marks given with `extra=` win over those of `about`."""

    def __init__(self, fixed: Mapping[str, object]) -> None:
        super().__init__()
        self._fixed = fixed

    def format(self, record: logging.LogRecord) -> str:
        context = _about.get()
        marks = {name: getattr(record, name, context.get(name)) for name in ABOUT}
        line = {
            **self._fixed,
            "at": utc_timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_without_none(marks),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: a stream of any encoding can take it


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _to_file(path: Path) -> WatchedFileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return WatchedFileHandler(path, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"the log {path} cannot be written: {e.strerror}; choose another place") from e
