"""`fedlora audit`: a run's promise of privacy put to the test; also many times over, and on bugs that are planted."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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

LITTLE = (
    "A canary bound that passes proves little: of a sound client it is about a quarter of the true epsilon, and the "
    "other tests do the work."
)
EPSILON = {"dp.epsilon": 3.0}  # where no noise is given
EMBEDDED = {"model.max_length": 16, "lora.targets": "all-linear", "train.batch_size": 64, "threads": 1}  # a tiny model
Told = tuple[dict[str, Any], Table]  # for a program, and for a person
FREE = {"seed", "threads", "model.device", "train.batch_size"}  # what may be changed of a run, and it is still that run
SHOWN = ("strategy", "model.path", "model.head", "lora.kind", "lora.rank", "train.batch_size", "seed")


@dataclass(frozen=True)
class Level:
    """What is audited of a run that hides records, or clients."""

    build: Callable[[Config, int], Any]
    tests: Sequence[Callable[[Any, Any], Iterator[Any]]]
    subject: Any  # the product as it is
    controls: Sequence[Any]


def audit(run: Path | None, given: Mapping[str, Any], repeat: int, controls: bool, as_json: bool) -> bool:
    """Audit a run's settings, or those that are given, and print what came of it; true where all is as it should be.

    A run that is audited as it is gets `audit.json` into its directory. Raises `PrivacyError` for what has no privacy,
    or is refused it.
    """
    console = Console(highlight=False, stderr=as_json)
    with console.status("loading"):
        mute_transformers()
        config = settings(run, given)
        level = _level(config)
        stage = level.build(config, config.seed)
    began = time.monotonic()
    if controls:
        told, table = _control(console, level, stage, repeat)
    elif repeat > 1:
        told, table = _repeat(console, level, stage, repeat)
    else:
        told, table = _once(console, level, stage)
    told |= {"seconds": round(time.monotonic() - began, 2), "settings": _settings(config, stage)}
    if run and "tests" in told and FREE.issuperset(given):
        write_durably(run / "audit.json", json.dumps(told, indent=1).encode())
        refresh(RunDirectory(run))
    if as_json:
        print(json.dumps(told))
    else:
        console.print(table)
        console.print(Text(_verdict(told)))
    return bool(told["passed"])


def settings(run: Path | None, given: Mapping[str, Any]) -> Config:
    """The run's settings, or small ones that take a few seconds, under those that are given."""
    if run:
        config = configuration.build(RunDirectory(run).config(), given)
    else:
        small = {} if given.get("model.path") or given.get("data.path") else _embedded()
        config = configuration.build({} if given.get("dp.noise") else EPSILON, small, given)
    if not config.dp.on:
        where = str(run) if run else "this"
        raise PrivacyError(f"{where} has no privacy to audit: neither dp.epsilon nor dp.noise is set")
    return config


def _embedded() -> dict[str, Any]:
    from fedlora.checks.small_models import small_model

    return {**EMBEDDED, "model.path": small_model("bert").config.path}


def _level(config: Config) -> Level:
    from . import client_level, planted_bugs, record_level
    from . import subject as subject_module

    if config.dp.by_client:
        return Level(client_level.build, client_level.TESTS, client_level.ClientLevelSubject(), planted_bugs.CLIENT)
    return Level(subject_module.build, record_level.TESTS, subject_module.Subject(), planted_bugs.RECORD)


def _examine(console: Console, level: Level, stage: Any, subject: Any, about: str = "") -> list[Any]:
    """Every finding of every test, with the seconds of those that come out of one test shared among them."""
    findings: list[Any] = []
    for look in level.tests:
        began = time.monotonic()
        with console.status(Text(f"{about}{look.__name__}")):
            some = list(look(stage, subject))
        each = (time.monotonic() - began) / len(some)
        findings += [replace(f, seconds=round(each, 3)) for f in some]
    return findings


def _once(console: Console, level: Level, stage: Any) -> Told:
    findings = _examine(console, level, stage, level.subject)
    table = Table("", "test", "measured", "allowed", "seconds", box=None, pad_edge=False)
    for f in findings:
        measured = f"{f.measured:#.4g} {f.unit}"
        table.add_row("+" if f.passed else "X", f.name, measured, f.allowed, f"{f.seconds:.1f}")
    return {"passed": all(f.passed for f in findings), "tests": [asdict(f) for f in findings]}, table


def _repeat(console: Console, level: Level, stage: Any, repeat: int) -> Told:
    """As many audits, each with canaries and records of its own: how often does a test fail of what is sound?"""
    alarms: Counter[str] = Counter()
    seen: dict[str, list[float]] = {}
    for n in range(repeat):
        for f in _examine(console, level, replace(stage, seed=stage.seed + n), level.subject, f"{n + 1}/{repeat} "):
            seen.setdefault(f.name, []).append(f.measured)
            alarms[f.name] += not f.passed
    table = Table("test", "alarms", "least measured", "most", box=None, pad_edge=False)
    for name, some in seen.items():
        table.add_row(name, f"{alarms[name]} of {repeat}", f"{min(some):.4g}", f"{max(some):.4g}")
    return {"passed": not alarms.total(), "runs": repeat, "alarms": {name: alarms[name] for name in seen}}, table


def _control(console: Console, level: Level, stage: Any, repeat: int) -> Told:
    """Every planted bug, as often: which tests find it?"""
    table = Table("planted", "caught", "by", "seconds", box=None, pad_edge=False)
    told = []
    for control in level.controls:
        began, caught = time.monotonic(), 0
        by: Counter[str] = Counter()
        for n in range(repeat):
            here, about = replace(stage, seed=stage.seed + n), f"{control.name} {n + 1}/{repeat}: "
            failed = [f.name for f in _examine(console, level, here, control.plant(here), about) if not f.passed]
            by.update(failed)
            caught += any(name.startswith(control.caught_by) for name in failed)
        said = ", ".join(f"{name} {n}/{repeat}" for name, n in sorted(by.items()))
        table.add_row(control.name, f"{caught}/{repeat}", said, f"{(time.monotonic() - began) / repeat:.1f}")
        told.append({"name": control.name, "passed": caught == repeat, "caught": caught, "by": dict(by)})
    return {"passed": all(one["passed"] for one in told), "runs": repeat, "controls": told}, table


def _settings(config: Config, stage: Any) -> dict[str, Any]:
    """What was audited, flat: the run's settings that matter, and the audit's own plan."""
    every = flatten(config)
    chosen = {key: every[key] for key in every if key in SHOWN or key.startswith("dp.")}
    chosen = {key: value for key, value in chosen.items() if value != float("inf")}  # which JSON has no word for
    if config.dp.by_client:
        m = stage.client_level
        return chosen | {"audit.noise": m.noise, "audit.rate": m.rate, "audit.clients": m.population}
    p = stage.privacy
    plan = {"noise": p.noise, "rate": p.rate, "steps": p.steps, "delta": p.delta, "rounds": stage.terms.rounds}
    plan |= {"records": stage.records, "canaries": stage.canaries}
    return chosen | {f"audit.{key}": value for key, value in plan.items()}


def _verdict(told: Mapping[str, Any]) -> str:
    seconds = f"in {told['seconds']:.0f} s"
    if "controls" in told:
        missed = [one["name"] for one in told["controls"] if not one["passed"]]
        return f"missed: {', '.join(missed)}, {seconds}" if missed else f"every planted bug was caught, {seconds}"
    if "alarms" in told:
        return f"{sum(told['alarms'].values())} alarms in {told['runs']} audits, {seconds}"
    failed = [f"{f['name']} ({f['detail']})" for f in told["tests"] if not f["passed"]]
    if failed:
        return f"failed, {seconds}: {'; '.join(failed)}. Do not rely on this run's epsilon."
    return f"passed, {seconds}. {LITTLE}"
