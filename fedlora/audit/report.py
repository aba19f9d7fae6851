"""`fedlora audit`: a run's privacy tested; on request many times over, or with planted bugs that must be found."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora import config as configuration
from fedlora.config import Config, flatten
from fedlora.errors import PrivacyError
from fedlora.run.directory import RunDirectory
from fedlora.run.privacy_report import refresh
from fedlora.run.setup import mute_transformers
from fedlora.storage.files import write_durably

if TYPE_CHECKING:
    from .planted_bugs import PlantedBug
    from .statistics import Finding

LITTLE = (
    "A canary bound that passes proves little: of a sound client it is about a quarter of the true epsilon, and the "
    "other tests do the work."
)
EPSILON = {"dp.epsilon": 3.0}  # unless noise is set
EMBEDDED = {"model.max_length": 16, "lora.targets": "all-linear", "train.batch_size": 64, "threads": 1}  # a tiny model
FREE = {"seed", "threads", "model.device", "train.batch_size"}  # settings that may differ from those of an audited run
SHOWN = ("strategy", "model.path", "model.head", "lora.kind", "lora.rank", "train.batch_size", "seed")


@dataclass(frozen=True)
class Level:
    """The audit of record-level or of client-level privacy."""

    build: Callable[[Config, int], Any]  # settings and seed -> the setting in which everything is tested
    tests: "Sequence[Callable[[Any, Any], Iterator[Finding]]]"
    subject: Any  # the product as it is
    bugs: "Sequence[PlantedBug]"


@dataclass(frozen=True)
class Outcome:
    """What came of an audit: for a program, and for a person."""

    content: dict[str, Any]
    table: Table
    verdict: str
    remark: str = ""  # the end of the verdict's sentence, and what follows it


def audit(run: Path | None, given: Mapping[str, Any], *, repeat: int, controls: bool, as_json: bool) -> bool:
    """Audit a run's settings, or those that are given, print the outcome, and return whether all is as it should be.

    A run that is audited with its own settings gets `audit.json` into its directory. Raises `PrivacyError` for settings
    without privacy, and for those that are refused privacy.
    """
    console = Console(highlight=False, stderr=as_json)
    with console.status("loading"):
        mute_transformers()
        config = settings(run, given)
        level = _level(config)
        setting = level.build(config, config.seed)
    began = time.monotonic()
    outcome = _run(console, level, setting, repeat=repeat, controls=controls)
    seconds = time.monotonic() - began
    content = outcome.content | {"seconds": round(seconds, 2), "settings": _settings(config, setting)}
    if run and "tests" in content and FREE.issuperset(given):
        with RunDirectory(run).only_writer():
            write_durably(run / "audit.json", json.dumps(content, indent=1).encode())
            refresh(RunDirectory(run))
    if as_json:
        print(json.dumps(content))
    else:
        console.print(outcome.table)
        console.print(Text(f"{outcome.verdict}, in {seconds:.0f} s{outcome.remark}"))
    return bool(content["passed"])


def settings(run: Path | None, given: Mapping[str, Any]) -> Config:
    """Return the run's settings, or else small ones that take a few seconds, with the given settings over them."""
    config = configuration.build(RunDirectory(run).config(), given) if run else _small(given)
    if not config.dp.on:
        where = str(run) if run else "this"
        raise PrivacyError(f"{where} has no privacy to audit: neither dp.epsilon nor dp.noise is set")
    return config


def _small(given: Mapping[str, Any]) -> Config:
    """Return settings for the given model and data, or for a tiny model, with a default epsilon."""
    layers: list[Mapping[str, Any]] = []
    if not given.get("dp.noise"):
        layers.append(EPSILON)
    if not given.get("model.path") and not given.get("data.path"):
        from fedlora.checks.small_models import small_model

        layers.append({**EMBEDDED, "model.path": small_model("bert").config.path})
    return configuration.build(*layers, given)


def _level(config: Config) -> Level:
    from . import client_level, planted_bugs, planted_client_level_bugs, record_level
    from .subject import RecordLevelSubject, record_level_setting

    if config.dp.by_client:
        build, subject = client_level.client_level_setting, client_level.ClientLevelSubject()
        return Level(build, client_level.TESTS, subject, planted_client_level_bugs.CLIENT)
    return Level(record_level_setting, record_level.TESTS, RecordLevelSubject(), planted_bugs.RECORD)


def _run(console: Console, level: Level, setting: Any, *, repeat: int, controls: bool) -> Outcome:
    if controls:
        return _with_bugs(console, level, setting, repeat)
    if repeat > 1:
        return _repeatedly(console, level, setting, repeat)
    return _once(console, level, setting)


def _examine(console: Console, level: Level, setting: Any, subject: Any, about: str = "") -> "list[Finding]":
    """Return the findings of all tests; the seconds of a test are divided among its findings."""
    findings: list[Finding] = []
    for test in level.tests:
        began = time.monotonic()
        with console.status(Text(f"{about}{test.__name__}")):
            found = list(test(setting, subject))
        seconds = round((time.monotonic() - began) / len(found), 3)
        findings += [replace(finding, seconds=seconds) for finding in found]
    return findings


def _once(console: Console, level: Level, setting: Any) -> Outcome:
    findings = _examine(console, level, setting, level.subject)
    table = _table(findings)
    failed = [f"{f.name} ({f.detail})" for f in findings if not f.passed]
    content = {"passed": not failed, "tests": [asdict(f) for f in findings]}
    if failed:
        return Outcome(content, table, "failed", f": {'; '.join(failed)}. Do not rely on this run's epsilon.")
    return Outcome(content, table, "passed", f". {LITTLE}")


def _table(findings: "Sequence[Finding]") -> Table:
    table = Table("", "test", "measured", "allowed", "seconds", box=None, pad_edge=False)
    for f in findings:
        measured = f"{f.measured:#.4g} {f.unit}"
        table.add_row("+" if f.passed else "X", f.name, measured, f.allowed, f"{f.seconds:.1f}")
    return table


def _repeatedly(console: Console, level: Level, setting: Any, repeat: int) -> Outcome:
    """Audit so many times, each with canaries and records of its own: how often does a sound product fail a test?"""
    alarms: Counter[str] = Counter()
    measured: dict[str, list[float]] = {}
    for n in range(repeat):
        for f in _examine(console, level, replace(setting, seed=setting.seed + n), level.subject, f"{n + 1}/{repeat} "):
            measured.setdefault(f.name, []).append(f.measured)
            alarms[f.name] += not f.passed
    table = Table("test", "alarms", "least measured", "most", box=None, pad_edge=False)
    for name, values in measured.items():
        table.add_row(name, f"{alarms[name]} of {repeat}", f"{min(values):.4g}", f"{max(values):.4g}")
    content = {"passed": not alarms.total(), "runs": repeat, "alarms": {name: alarms[name] for name in measured}}
    return Outcome(content, table, f"{alarms.total()} alarms in {repeat} audits")


def _with_bugs(console: Console, level: Level, setting: Any, repeat: int) -> Outcome:
    """Plant every bug in turn, so many times each: which tests find it?"""
    table = Table("planted", "caught", "by", "seconds", box=None, pad_edge=False)
    content: list[dict[str, Any]] = []
    for bug in level.bugs:
        began = time.monotonic()
        found = _find(console, level, setting, bug, repeat)
        by = ", ".join(f"{name} {n}/{repeat}" for name, n in sorted(found["by"].items()))
        table.add_row(bug.name, f"{found['caught']}/{repeat}", by, f"{(time.monotonic() - began) / repeat:.1f}")
        content.append(found)
    missed = [found["name"] for found in content if not found["passed"]]
    verdict = f"missed: {', '.join(missed)}" if missed else "every planted bug was caught"
    return Outcome({"passed": not missed, "runs": repeat, "controls": content}, table, verdict)


def _find(console: Console, level: Level, setting: Any, bug: "PlantedBug", repeat: int) -> dict[str, Any]:
    """Return how often the bug was caught by its own test, and how often each test failed."""
    caught = 0
    by: Counter[str] = Counter()
    for n in range(repeat):
        here = replace(setting, seed=setting.seed + n)
        findings = _examine(console, level, here, bug.plant(here), f"{bug.name} {n + 1}/{repeat}: ")
        failed = [finding.name for finding in findings if not finding.passed]
        by.update(failed)
        caught += bug.is_caught(failed)
    return {"name": bug.name, "passed": caught == repeat, "caught": caught, "by": dict(by)}


def _settings(config: Config, setting: Any) -> dict[str, Any]:
    """Return what was audited by dotted names: the run's settings that matter, and the audit's own plan."""
    chosen = {key: value for key, value in flatten(config).items() if _is_shown(key, value)}
    return chosen | {f"audit.{key}": value for key, value in setting.described().items()}


def _is_shown(key: str, value: Any) -> bool:
    return (key in SHOWN or key.startswith("dp.")) and value != inf  # JSON has no infinity
