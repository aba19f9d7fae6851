"""What the server's command tells the ServerApp that it has started by way of Flower: one file in the run directory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora.errors import CheckpointError
from fedlora.storage.files import replace_file

FOLDER = "FEDLORA_RUN"  # in the environment of Flower's SuperExec, and so of the ServerApp: the run directory
PARENT = "FEDLORA_SERVER"  # and the process of `fedlora server`, without which there is to be no ServerApp


@dataclass(frozen=True)
class RunOrder:
    """A run as it was asked for."""

    given: Mapping[str, Any]  # settings by their dotted keys
    names: Mapping[str, int]  # of the clients, and their numbers
    nodes: Mapping[str, int] | None  # node -> client, by its key; none: whoever comes is believed
    metrics: str = ""  # host:port of Prometheus' metrics


@dataclass(frozen=True)
class Status:
    """How the ServerApp is, or how it ended."""

    state: str  # submitted, running, finished, crashed, or failed: that is what starting again does not mend
    pid: int = 0
    why: str = ""
    attempt: int = 0


@dataclass(frozen=True)
class Handoff:
    """The files by which the command and the ServerApp tell each other."""

    run: Path
    flower: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flower", self.run / "flower")

    @property
    def screen(self) -> Path:
        """What a person is to see."""
        return self.flower / "screen.log"

    def rounds(self) -> int:
        """So many are finished."""
        path = self.run / "rounds.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def put_order(self, order: RunOrder) -> None:
        """For the next ServerApp."""
        _write(self.flower / "order.json", asdict(order))

    def order(self) -> RunOrder:
        """What the command asked for."""
        return RunOrder(**json.loads((self.flower / "order.json").read_text()))

    def put_status(self, status: Status) -> None:
        """For the command."""
        _write(self.flower / "status.json", asdict(status))

    def status(self) -> Status | None:
        """What the ServerApp said last; none before it has said anything."""
        try:
            return Status(**json.loads((self.flower / "status.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _write(path: Path, value: Any) -> None:
    try:
        replace_file(path, json.dumps(value).encode())
    except OSError as e:
        raise CheckpointError(f"{path} could not be written: {e.strerror}; make room, then start it again") from e
