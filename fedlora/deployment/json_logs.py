"""Logs for machines: one JSON object a line, each with the run, the round and the client that it is about."""

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
    """What is logged within is about these; what is left out stays as it is. A thread begins with none."""
    given = {"run": run, "round": round, "client": client}
    token = _about.set({**_about.get(), **{k: v for k, v in given.items() if v is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def log_json(where: TextIO | Path, **fixed: object) -> Callable[[], None]:
    """Log as JSON lines with these fields too; the returned function puts things back.

    On a stream they take the place of the lines for people, which would mix with them; to a file they go beside those.
    The file may be moved away by logrotate. Raises `ConfigError` where it cannot be opened.
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
    """A record as one line of JSON; what `extra=` says goes before what `about` says."""

    def __init__(self, fixed: Mapping[str, object]) -> None:
        super().__init__()
        self._fixed = fixed

    def format(self, record: logging.LogRecord) -> str:
        of, context = vars(record), _about.get()
        said = {name: of.get(name, context.get(name)) for name in ABOUT}
        line = {
            **self._fixed,
            "at": utc_timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in said.items() if value is not None},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: a stream of any encoding can take it


def _to_file(path: Path) -> WatchedFileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return WatchedFileHandler(path, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"the log {path} cannot be written: {e.strerror}; choose another place") from e
