"""The hashes of the files that a run rests on, by which one that goes on sees that they are still the same.

A dataset on the hub has no file here: its name is taken to stand for the same rows. Of a model on the hub the hash is
its fingerprint, a sample of its weights.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlora.config import Config
from fedlora.data import python_stdlib
from fedlora.data.sources import data_files
from fedlora.errors import DataError
from fedlora.models.base_model import model_files
from fedlora.storage.files import hash_file


def file_hashes(config: Config, *, base: str, reads_library: bool) -> dict[str, str]:
    """The hash of every file that a run reads, by the setting that names it and the file's place below that.

    `base` is the fingerprint of the base model; `reads_library`: the rows are those that come with Python. A folder
    that was moved as a whole has the same names. Raises `DataError` for a file that cannot be read.
    """
    found = dict(_named("model.path", model_files(config.model.path))) or {"model.path": base}
    for setting, spec in (
        ("data.path", config.data.path),
        ("data.eval", config.data.eval),
        ("lora.init_data", config.lora.init_data),
    ):
        found |= _named(setting, data_files(spec))
    if config.simulation.trace:
        found |= _named("simulation.trace", [Path(config.simulation.trace)])
    if reads_library:
        found["the text of Python's standard library"] = python_stdlib.digest()
    return found


def _named(setting: str, files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield the name of each file, and its hash."""
    root = os.path.commonpath([path.absolute().parent for path in files]) if files else ""
    for path in files:
        try:
            yield f"{setting} {path.absolute().relative_to(root).as_posix()}", hash_file(path)
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror}") from e
