"""Hand-over between `fedlora server` and the ServerApp.

Flower starts the ServerApp in a process of its own, so the two exchange files in RUN/flower: order.json says what to
run, status.json how it went, and screen.log holds the lines that the command shows.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import CheckpointError
from fedlora.storage.files import replace_file

# Variables in the environment of Flower's SuperExec, and so of the ServerApp:
FOLDER = "FEDLORA_RUN"  # the run directory
PARENT = "FEDLORA_SERVER"  # the process id of `fedlora server`; when that process ends, the ServerApp does too


@dataclass(frozen=True)
class RunOrder:
    """What the ServerApp is to run."""

    given: Mapping[str, Any]  # settings by their dotted keys
    names: Mapping[str, int]  # name of a client -> the client's number
    nodes: Mapping[str, int] | None  # node -> number of the client whose key it has; none: nodes say who they are
    metrics: str = ""  # HOST:PORT for Prometheus' metrics; empty: none


@dataclass(frozen=True)
class Status:
    """What the ServerApp is doing, or how it ended."""

    state: str  # submitted, running, finished, crashed, or what starting again does not mend: failed, refused
    pid: int = 0
    why: str = ""  # it crashed, failed or was refused
    attempt: int = 0  # from 1; how many were made since the last finished round


@dataclass(frozen=True)
class Handoff:
    """The files through which the command and the ServerApp talk."""

    run: Path  # the run directory

    @property
    def flower(self) -> Path:
        """The folder of what Flower and the hand-over need."""
        return self.run / "flower"

    @property
    def screen(self) -> Path:
        """The file of the lines that the command shows to a person."""
        return self.flower / "screen.log"

    def rounds(self) -> int:
        """The number of finished rounds."""
        try:
            return (self.run / "rounds.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def put_order(self, order: RunOrder) -> None:
        """Write what the next ServerApp is to run. Raises `CheckpointError`."""
        _write(self.flower / "order.json", asdict(order))

    def order(self) -> RunOrder:
        """What the command asked the ServerApp to run."""
        return RunOrder(**json.loads((self.flower / "order.json").read_text()))

    def ordered_rounds(self) -> int:
        """The number of rounds that the last order was for; 0 where it is missing or damaged."""
        try:
            return int(self.order().given["rounds"])
        except (OSError, ValueError, TypeError, LookupError):
            return 0

    def put_status(self, status: Status) -> None:
        """Write what the command is to know of the ServerApp. Raises `CheckpointError`."""
        _write(self.flower / "status.json", asdict(status))

    def status(self) -> Status | None:
        """The status that was written last; none before the first."""
        try:
            return Status(**json.loads((self.flower / "status.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _write(path: Path, value: Any) -> None:
    try:
        replace_file(path, json.dumps(value).encode())
    except OSError as e:
        raise CheckpointError(f"{path} could not be written: {e.strerror}; make room, then start it again") from e
