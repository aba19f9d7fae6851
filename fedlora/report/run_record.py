"""What lies in a run directory, read for a report: what its reader may know of the run, and nothing else.

A report is made to be passed on. So of a run that hides whole clients it leaves out whatever tells who was in which
round, or how many were; of a run whose server sees sums alone, how many rows each client has; of every private run
the labels of the clients' rows. Paths are cut to their last part. Strings are as somebody chose them: a client, a file,
a strategy. What cannot be seen in them is written out here, and whoever puts them into a page escapes them.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError
from fedlora.log_lines import escaped
from fedlora.run.directory import RunDirectory

TOLD_OF_HIDDEN_CLIENTS = (  # keys of a round's record that say nothing of who was in it, or of how many were
    "round",
    "before",
    "eval",
    "eval_clients",
    "notes",
    "epsilon",
    "epsilon_median",
    "clip",
    "next_clip",
    "noise_to_signal",
)
FOLDERS = re.compile(
    r"(?<![^\s\"'=(,])(?:/|~/|[A-Za-z]:\\)(?:[^\s/\\\"',;]+[/\\])+"
)  # of a path, without its last part
log = logging.getLogger("fedlora")


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory has it, without what a report may not tell."""

    folder: str  # the directory's own name
    settings: Mapping[str, Any]  # by dotted key
    rounds: Sequence[Mapping[str, Any]]  # the lines of rounds.jsonl
    stages: Mapping[str, Any]  # personal.json
    inputs: Mapping[str, Any]  # inputs.json
    privacy: Mapping[str, Any]  # privacy.json
    audit: Mapping[str, Any]  # audit.json
    about: Mapping[str, Any]  # run.json
    adapter_check: str  # what was found when the adapter was loaded afresh
    has_adapter: bool
    is_deployed: bool  # were the clients on machines of their own?

    @property
    def hides_clients(self) -> bool:
        """Does the run hide who was in which round?"""
        return _hides_clients(self.settings)

    @property
    def is_private(self) -> bool:
        """Is there noise, or a sum, between the clients and the server?"""
        return _is_private(self.settings)

    @property
    def names(self) -> dict[int, str]:
        """What clients are called, of those that have a name."""
        told, sizes = self.inputs.get("clients", ()), self.inputs.get("data", {}).get("sizes", ())
        named = dict(enumerate(told)) if len(told) == len(sizes) else {}  # a deployed server knows none by their files
        for record in self.rounds:
            named |= {int(i): name for i, name in record.get("names", {}).items()}
        return named

    def name_of(self, client: int | str) -> str:
        """What a client is called."""
        return self.names.get(int(client), f"client {client}")


def read(path: Path) -> RunRecord:
    """The record of the run that lies in a folder. Raises `ConfigError` where none does."""
    folder = RunDirectory(path)
    if not (path / "config.toml").exists() and not folder.checkpoints.exists():
        raise ConfigError(f"{path} is no run directory: it has neither config.toml nor checkpoint/")
    settings = folder.config()
    return RunRecord(
        folder=_shown(path.resolve().name),
        settings=_shown(settings),
        rounds=[_shown(_tellable(record, settings)) for record in folder.records()],
        stages=_shown(folder.stages()),
        inputs=_shown(_tellable_inputs(_content(path / "inputs.json"), settings)),
        privacy=_shown(_content(path / "privacy.json")),
        audit=_shown(_content(path / "audit.json")),
        about=_shown(_content(path / "run.json")),
        adapter_check=_shown(folder.adapter_verdict()),
        has_adapter=(folder.adapter / "adapter_config.json").exists(),
        is_deployed=(path / "audit.jsonl").exists(),
    )


def without_folders(text: str) -> str:
    """The text with every path in it cut to its last part.

    >>> without_folders("3 rows of /home/anna/notes.jsonl are empty; see https://example.org/a")
    '3 rows of notes.jsonl are empty; see https://example.org/a'
    """
    return FOLDERS.sub("", text)


def _hides_clients(settings: Mapping[str, Any]) -> bool:
    return _has_noise(settings) and settings["dp.level"] == "client"


def _is_private(settings: Mapping[str, Any]) -> bool:
    return _has_noise(settings) or bool(settings["secure.aggregation"])


def _has_noise(settings: Mapping[str, Any]) -> bool:
    return bool(settings["dp.epsilon"] < float("inf") or settings["dp.noise"] > 0)


def _tellable(record: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A round's record without what may not be passed on."""
    if not _hides_clients(settings):
        return record
    return {key: record[key] for key in TOLD_OF_HIDDEN_CLIENTS if key in record}


def _tellable_inputs(inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the run told before its start, without what may not be passed on."""
    if not inputs or not _is_private(settings):
        return inputs
    data = {**inputs["data"], "classes": {name: [] for name in inputs["data"]["classes"]}}
    if settings["secure.aggregation"] or _hides_clients(settings):
        data |= {"sizes": [], "heldout": []}
    return {**inputs, "data": data, "warnings": [], "tokens": None}


def _content(path: Path) -> dict[str, Any]:
    """The object in a file of the run directory; empty where there is none, or, with a warning, where it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        log.warning("%s is damaged (%s), and is left out of the report", path, e)
        return {}
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> Any:
    """The value with all its strings, keys too, as a reader may see them: no folders, and nothing that is invisible."""
    if isinstance(value, str):
        return escaped(without_folders(value))
    if isinstance(value, Mapping):
        return {_shown(key): _shown(content) for key, content in value.items()}
    return [_shown(content) for content in value] if isinstance(value, list | tuple) else value
