"""A run directory: config.toml, rounds.jsonl, checkpoint/, adapter/, TensorBoard events; resumed after any crash."""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

from fedlora import config
from fedlora.config import Config
from fedlora.errors import CheckpointError, ConfigError
from fedlora.jobs import Charge, PrivacySpent
from fedlora.sections import PersonalConfig
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.storage.client_state import ClientState
from fedlora.storage.event_log import utc_timestamp
from fedlora.storage.files import append_durably, only_writer, write_durably

from .plan import ResumePoint, RoundResult
from .trackers import TrackedRun, Trackers, may_be_told
from .versions import versions

CURVES = ("train_loss", "answered", "bytes_up", "bytes_down", "seconds", "clock", "exactness", "epsilon")  # of a record
GROUPS = ("eval", "eval_clients", "notes")  # of a record: each holds figures by name
MOST_DRAWN = 50  # clients whose own figures are drawn as curves; of more, rounds.jsonl alone has them
AS_BEFORE = {  # of a run that is older than these settings
    "data.split": "sample",
    "data.limit_takes": "first",
    "data.template": "plain",
    "server.eval_clients": 0,
    "model.class_order": "data",
}
log = logging.getLogger("fedlora")


class RunDirectory:
    """What a run leaves on the disk: all that it needs to go on, and all that is read of it later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoint"
        self.clients = path / "checkpoint" / "clients"  # what simulated clients keep
        self.adapter = path / "adapter"
        self.report = path / "report.html"  # all of it for people, as one page
        self.answers = path / "answers"  # what the model generated, a file for each round that had it
        self.adapter_check = path / "adapter_check.json"  # whether the adapter, loaded afresh, is what was evaluated
        self._begun_with: dict[str, Any] = {}  # its name, settings, files' hashes, its beginning: in each checkpoint
        self._past: list[Mapping[str, Any]] = []  # the records of all rounds so far, once the run goes on

    def only_writer(self) -> AbstractContextManager[None]:
        """Be the only process that writes here, inside a `with`. Raises `ConfigError` where another one does."""
        return only_writer(self.path)

    def create(self, settings: Config, *, again: bool = False, files: Mapping[str, str] | None = None) -> None:
        """Make the folder with its resolved config; refuse one where another run has begun, unless it goes on.

        `files` are the hashes of the files that the run rests on. Raises `ConfigError` for a run that goes on where
        they are others than when it began.
        """
        if not again:
            self.check_is_new()
        before = checkpoint.begun_with(self.checkpoints)
        self.check_files(files or {})
        write_durably(self.path / "config.toml", config.dumps(settings).encode())
        name = self._keep_name(str(before.get("run", "")))
        begun = str(before.get("begun") or self.about().get("begun") or utc_timestamp(time.time()))
        kept = {"settings": config.flatten(settings), "files": dict(files or {}), "begun": begun}
        self._begun_with = {"run": name, **kept}
        self._describe(settings)

    def check_is_new(self) -> None:
        """Raise `ConfigError` where a run has begun here."""
        if self.records() or self.checkpoints.exists():
            raise ConfigError(
                f"{self.path} holds a run already; --resume {self.path} goes on with it, or choose another --out"
            )

    def _describe(self, settings: Config) -> None:
        """Write `run.json`: what run this is, in a few words and hashes, and by which versions it was computed."""
        earlier, now = self.about(), versions()
        others = [*earlier.get("earlier_versions", []), earlier.get("versions", now)]
        about = {
            "run": self._begun_with["run"],
            "strategy": settings.strategy,
            "option": settings.option,
            "seed": settings.seed,
            "settings_sha256": sha256(config.dumps(settings).encode()).hexdigest(),
            "files_sha256": sha256(json.dumps(self._begun_with["files"], sort_keys=True).encode()).hexdigest(),
            "begun": self._begun_with["begun"],
            "versions": now,
            "earlier_versions": [other for other in others if other != now],
        }
        write_durably(self.path / "run.json", f"{json.dumps(about, indent=1)}\n".encode())

    def about(self) -> dict[str, Any]:
        """What `run.json` says of the run: its strategy, seed, hashes and versions; empty for a run of before it."""
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def check_files(self, files: Mapping[str, str], of: str = "") -> None:
        """Raise `ConfigError` where the files that the run rests on, or those `of` one setting, are not as they were.

        `files` are their hashes now; without any, and where none were kept, nothing is compared.
        """
        before = checkpoint.begun_with(self.checkpoints).get("files", {})
        for name in sorted(before.keys() | files.keys()) if before and files else ():
            if name.startswith(of) and before.get(name) != files.get(name):
                raise ConfigError(
                    f"{name} is not what it was when the run in {self.path} began, whose rounds rest on it; put it "
                    "back, or begin a new run elsewhere"
                )

    @property
    def run(self) -> str:
        """The run's name, the same however often it is resumed; clients elsewhere keep what is theirs by it."""
        try:
            return self._name.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return ""

    @property
    def _name(self) -> Path:
        return self.path / "run"

    def _keep_name(self, before: str) -> str:
        """Write the name that the run had `before`, or a new one to a run that had none, and return the name."""
        found = self.run
        if before and found != before:
            log.warning("%s is damaged; the run's name is put back from the checkpoint", self._name)
        name = before or found or f"{time.strftime('%Y%m%d')}-{token_hex(8)}"
        if name != found:
            write_durably(self._name, f"{name}\n".encode())
        return name

    def config(self) -> dict[str, Any]:
        """The settings of the run that lies here, as dotted keys.

        Where config.toml cannot be read, or lacks some of them, they are taken from the checkpoint: the file was
        written with all of them, so the last one that is left of it may be cut too. Raises `ConfigError` where there
        is neither, and where config.toml has another value of what the finished rounds rest on.
        """
        path = self.path / "config.toml"
        before: dict[str, Any] = dict(checkpoint.begun_with(self.checkpoints).get("settings", {}))
        try:
            found = config.read(path)
            if not found:
                raise ConfigError(f"{path} is empty; put it back from a copy, or begin anew with --out")
        except ConfigError as e:
            if before:
                log.warning("%s; the settings are taken from the checkpoint", e)
                return before
            if not path.exists():
                raise ConfigError(f"{self.path} is no run directory: it has no config.toml") from e
            raise
        if lacks := sorted(before.keys() - found.keys()):
            log.warning("%s lacks %s, which the run had; all settings are taken from the checkpoint", path, lacks[0])
            found = before
        for key in config.bound_keys(before):
            if found[key] != before[key]:
                raise ConfigError(
                    f"{path} has {key} = {found[key]}, and the finished rounds had {before[key]}; put that back, "
                    "or remove the file: the checkpoint has its settings"
                )
        return AS_BEFORE | found

    def adapter_verdict(self) -> str:
        """What was found when the adapter was loaded afresh, in words; empty before."""
        try:
            return str(json.loads(self.adapter_check.read_text(encoding="utf-8"))["said"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def has_stages(self, asked: PersonalConfig, rounds: int) -> bool:
        """Have clients done after so many rounds, for their own use, what is asked?"""
        found = self.stages()
        return found.get("round") == rounds and vars(asked).items() <= found.items()

    def keep_stages(self, record: Mapping[str, Any]) -> None:
        """Write what is told of what clients did after the last round, as `personal.json`."""
        write_durably(self.path / "personal.json", f"{json.dumps(record, indent=1)}\n".encode())

    def stages(self) -> dict[str, Any]:
        """What is told of what clients did after the last round; empty where they did nothing."""
        try:
            found: dict[str, Any] = json.loads((self.path / "personal.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    def keep_preview(self, preview: Mapping[str, Any]) -> None:
        """Write what the run is about to do, as `inputs.json`."""
        write_durably(self.path / "inputs.json", f"{json.dumps(preview, indent=1)}\n".encode())

    def records(self) -> list[dict[str, Any]]:
        """The records of the run's rounds: the lines of rounds.jsonl that are whole."""
        try:
            lines = (self.path / "rounds.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as e:
            raise CheckpointError(
                f"{self.path}/rounds.jsonl cannot be read: {e.strerror}; remove it, and resume"
            ) from e
        records: list[dict[str, Any]] = []
        for line in lines:
            record = _record(line)
            if record is None:
                break  # a crash in the middle of a line: the checkpoint has it whole
            records.append(record)
        return records

    def save(self, done: RoundResult, record: Mapping[str, Any]) -> None:
        """Keep a finished round: first what can be resumed, then the line about it."""
        kept = Checkpoint(
            round=done.number,
            state=done.state,
            record=dict(record),
            scores=done.scores,
            in_flight=done.in_flight,
            earlier=[dict(earlier) for earlier in self._past],
            begun_with=self._begun_with,
        )
        checkpoint.save(self.checkpoints, kept)
        self._past.append(record)
        self._append(record)
        self._chart(record)

    def resume_point(self) -> ResumePoint | None:
        """Where the run stopped; rounds.jsonl is put in step with the checkpoint, whatever moment the crash chose.

        Raises `CheckpointError` where rounds were finished and nothing is left from which to go on.
        """
        last = self._last()
        if last is None and (lost := self.records()):
            raise CheckpointError(
                f"{self.path}/rounds.jsonl has {len(lost)} rounds, and {self.checkpoints} has no checkpoint; put it "
                "back from a copy, or begin a new run elsewhere"
            )
        self._past = _with_lost_charges([*self._until(last)], self.records()) if last else []
        text = "".join(f"{json.dumps(record)}\n" for record in self._past)
        write_durably(self.path / "rounds.jsonl", text.encode())
        return _resume_point(last, self._past) if last else None

    def _last(self) -> Checkpoint | None:
        """The newest checkpoint, or the one before where what a simulated client kept is whole for that one alone."""
        newest = None
        for found in checkpoint.newest_first(self.checkpoints):
            damaged = self._damaged_client(found.round)
            if not damaged:
                return found
            log.warning("what client %s kept in round %d is missing or damaged", damaged, found.round)
            newest = newest or found
        return newest

    def _damaged_client(self, rounds: int) -> str:
        """The number of a simulated client that kept a file which is not whole after so many rounds; else empty."""
        for folder in sorted(self.clients.glob("*")):
            if not all(ClientState(folder, name).is_whole(rounds) for name in ("kept", "left")):
                return folder.name
        return ""

    def _until(self, last: Checkpoint) -> Iterator[Mapping[str, Any]]:
        """Yield the records of all rounds up to that of the last checkpoint, which has them with it.

        One of version 0.1 has its own alone; the others are then those of rounds.jsonl. Raises `CheckpointError` where
        one is missing there.
        """
        known = self.records() if last.earlier is None else last.earlier
        by_round = {record["round"]: record for record in (*known, last.record)}
        for n in range(1, last.round + 1):
            if n not in by_round:
                raise CheckpointError(
                    f"{self.path}/rounds.jsonl is damaged: round {n} is missing, and the checkpoint of round "
                    f"{last.round} is of a version that did not keep it; put rounds.jsonl back from a copy"
                )
            yield by_round[n]

    def close(self) -> None:
        """Have the trackers write what they have not written yet."""
        if "_trackers" in self.__dict__:
            self._trackers.close()

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
    def _trackers(self) -> Trackers:
        """Where the run reports its figures."""
        settings = self._begun_with.get("settings", {})
        run = TrackedRun(self.run, self.path, may_be_told(settings))
        return Trackers(settings.get("report_to", ("tensorboard",)), run)

    def _chart(self, record: Mapping[str, Any]) -> None:
        """Report a round's figures, and with the first round those before it."""
        before = {f"eval/{name}": value for name, value in record.get("before", {}).items()}
        if before:
            self._trackers.log(before, 0)
        self._trackers.log(_figures(record), record["round"])


def newest(records: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """The last of some rounds' records that has something under a key; an empty one where none has."""
    found = [record for record in records if record.get(key) not in (None, {})]
    return found[-1] if found else {}


def _with_lost_charges(
    records: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The records, with the charges of rounds that are done again: what they released may have been seen."""
    charges = newest(known, "charges").get("charges")
    if not charges or len(known) <= len(records):
        return [*records]
    return [*records[:-1], {**records[-1], "charges": charges}]


def _record(line: str) -> dict[str, Any] | None:
    """The record in a line of rounds.jsonl; none where the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("round"), int) else None


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
        clock=float(newest(records, "clock").get("clock", 0.0)),
        in_flight=last.in_flight,
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
    each = record.get("each", {})
    for client, own in each.items() if len(each) <= MOST_DRAWN else ():
        figures |= {f"each/{name}/{client}": value for name, value in own.items()}
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
