"""A run directory: config.toml, rounds.jsonl, checkpoint/, adapter/, TensorBoard events; resumed after any crash."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedlora import config
from fedlora.config import Config
from fedlora.errors import CheckpointError, ConfigError
from fedlora.jobs import Charge, PrivacySpent
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.storage.files import append_durably, write_durably

from .plan import ResumePoint, RoundResult

CURVES = ("train_loss", "answered", "bytes_up", "bytes_down", "seconds", "exactness", "epsilon")  # of a record
GROUPS = ("eval", "eval_clients", "notes")  # of a record: each holds figures by name


class RunDirectory:
    """What a run leaves on the disk: all that it needs to go on, and all that is read of it later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoint"
        self.clients = path / "checkpoint" / "clients"  # what simulated clients keep
        self.adapter = path / "adapter"

    def create(self, settings: Config, *, again: bool = False) -> None:
        """Make the folder with its resolved config; refuse one where another run has begun, unless it goes on."""
        if not again and (self.records() or self.checkpoints.exists()):
            raise ConfigError(
                f"{self.path} holds a run already; --resume {self.path} goes on with it, or choose another --out"
            )
        write_durably(self.path / "config.toml", config.dumps(settings).encode())
        if not self._name.exists():
            write_durably(self._name, f"{time.strftime('%Y%m%d')}-{token_hex(8)}\n".encode())

    @property
    def run(self) -> str:
        """The run's name, the same however often it is resumed: clients elsewhere keep what is theirs by it."""
        return self._name.read_text(encoding="utf-8").strip()

    @property
    def _name(self) -> Path:
        return self.path / "run"

    def config(self) -> dict[str, Any]:
        """The settings of the run that lies here, as dotted keys."""
        if not (self.path / "config.toml").is_file():
            raise ConfigError(f"{self.path} is no run directory: it has no config.toml")
        return config.read(self.path / "config.toml")

    def records(self) -> list[dict[str, Any]]:
        """The records of the run's rounds: the lines of rounds.jsonl that are whole."""
        path = self.path / "rounds.jsonl"
        records: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # a crash in the middle of a line: the checkpoint has it whole
        return records

    def save(self, done: RoundResult, record: Mapping[str, Any]) -> None:
        """Keep a finished round: first what can be resumed, then the line about it."""
        checkpoint.save(self.checkpoints, Checkpoint(done.number, done.state, dict(record), done.scores))
        self._append(record)
        self._chart(record)

    def resume_point(self) -> ResumePoint | None:
        """Where the run stopped; rounds.jsonl is put in step with the checkpoint, whatever moment the crash chose."""
        last = checkpoint.latest(self.checkpoints)
        records = _until(last, self.records()) if last else []
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        write_durably(self.path / "rounds.jsonl", text.encode())
        return _resume_point(last, records) if last else None

    def close(self) -> None:
        """Flush what TensorBoard has not written yet."""
        if "_events" in self.__dict__:
            self._events.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        """Write a round's line; raise `CheckpointError` where there is no room for it."""
        try:
            append_durably(self.path / "rounds.jsonl", f"{json.dumps(record)}\n".encode())
        except OSError as e:
            raise CheckpointError(
                f"{self.path}/rounds.jsonl could not be written: {e.strerror}; the round is in the checkpoint: "
                f"make room, then {checkpoint.resume_hint(self.path)}"
            ) from e

    @cached_property
    def _events(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter  # untyped
        return writer(str(self.path / "tensorboard"))

    def _chart(self, record: Mapping[str, Any]) -> None:
        """Write a round's figures for TensorBoard; with the first round those before it."""
        for name, value in _figures(record).items():
            self._events.add_scalar(name, value, record["round"])
        for name, value in record.get("before", {}).items():
            self._events.add_scalar(f"eval/{name}", value, 0)
        self._events.flush()


def newest(records: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """The last of some rounds' records that has something under a key; an empty one where none has."""
    found = [record for record in records if record.get(key) not in (None, {})]
    return found[-1] if found else {}


def _until(last: Checkpoint, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of all rounds up to that of the last checkpoint, which has its own record with it."""
    return [record for record in records if record["round"] < last.round] + [last.record]


def _resume_point(last: Checkpoint, records: Sequence[Mapping[str, Any]]) -> ResumePoint:
    """Where a run takes up after the round of its last checkpoint, by the records of all its rounds."""
    spent: dict[int, PrivacySpent] = {}
    joined: Counter[int] = Counter()
    for record in records:
        reported = _spent(record)
        spent |= reported
        joined.update(reported.keys())
    hidden = newest(records, "charges")  # a skipped round has none
    return ResumePoint(
        rounds=last.round,
        state=last.state,
        losses=tuple(record["eval"]["loss"] for record in records if record["eval"]),
        spent=spent,
        joined=joined,
        clip=hidden.get("next_clip"),
        charges=tuple(Charge(noise=z, rate=q, steps=n) for z, q, n in hidden.get("charges", ())),
        scores=last.scores,
    )


def _spent(record: Mapping[str, Any]) -> dict[int, PrivacySpent]:
    """What the clients of a round had spent by then, where they hide their records."""
    spent = record.get("spent", {})
    return {int(client): PrivacySpent(epsilon=epsilon, charges=n) for client, (epsilon, n) in spent.items()}


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round that are drawn as curves, by the curve's name."""
    figures = {name: record.get(name) for name in CURVES}
    for group in GROUPS:
        figures |= {f"{group}/{name}": value for name, value in (record.get(group) or {}).items()}
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
