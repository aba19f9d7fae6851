"""A run that is refused before a client has worked leaves nothing where it was to lie."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import ConfigError, DataError, ModelError, PrivacyError, StrategyError

REFUSALS = (ConfigError, DataError, ModelError, StrategyError, PrivacyError)  # of settings, model or data


@contextmanager
def empty_if_refused(folder: Path) -> Iterator[None]:
    """Remove what was written in a run directory inside a `with` that a refusal ended before any client had worked.

    What lay there before stays.
    """
    before = {path.name for path in folder.iterdir()}
    try:
        yield
    except REFUSALS:
        for path in folder.iterdir() if not _has_work(folder) else ():
            if path.name not in before:
                _remove(path)
        raise


def _has_work(folder: Path) -> bool:
    """Has a run directory anything that a client's work came to?"""
    return any(path.is_file() and path.name != ".lock" for path in (folder / "checkpoint").rglob("*"))


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
