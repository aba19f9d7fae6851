"""T9: what a client tells besides its updates: scores, the reasons of failures, and a second try at a job that failed.

Messages go in by the handlers of a client, as from any server, and what is looked at is what comes out of them.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np

from fedlora.client import handlers
from fedlora.client.handlers import ClientContext
from fedlora.client.part_cache import PartStore
from fedlora.client.policy import ClientPolicy, policy_of
from fedlora.client.runner import JobRunner
from fedlora.encoding.encoder import Example
from fedlora.errors import (
    DataError,
    FedloraError,
    LedgerError,
    ModelError,
    PrivacyError,
    ReasonCode,
    SecureError,
    TrainingDiverged,
)
from fedlora.jobs import Job
from fedlora.messages import codec
from fedlora.messages.parts import Parts
from fedlora.messages.sketch import select_rows
from fedlora.run.plan import job_for

from .observer import StepObserver
from .statistics import Finding
from .subject import MadeUpClient, RecordLevelSetting, RecordLevelSubject

WORD = "patient 4711 of room 12"  # stands for a record's text, in an error's sentence
OURS = DataError, LedgerError, ModelError, PrivacyError, SecureError, TrainingDiverged
OTHERS = ValueError, KeyError, OSError, RuntimeError
CODES = frozenset(map(str, ReasonCode))
TOO_FAST = 3e38  # a learning rate with which every adapter is infinite after a step
NOWHERE = np.empty(0, dtype=np.int64)  # where the canaries are of a client that has none


def answers(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T9: are scores refused, is a reason a code, and is a job that failed after its charge never trained again?"""
    with TemporaryDirectory() as folder, _silenced():
        yield _scores(setting, subject, Path(folder) / "scores")
        yield _reasons(setting, subject, Path(folder) / "reasons")
        yield _failed_twice(setting, subject, Path(folder) / "failed")


@dataclass(frozen=True, eq=False)
class _Scored(MadeUpClient):
    """A client that holds its examples out as well."""

    @cached_property
    def heldout(self) -> list[Example]:
        """The made-up examples."""
        return list(self.examples)


@dataclass(frozen=True, eq=False)
class _Unreadable(MadeUpClient):
    """A client whose records cannot be read, for a reason that holds one of them."""

    @cached_property
    def records(self) -> Sequence[Sequence[Example]]:
        """Raise `DataError`, as for a wrong label."""
        raise DataError(f'line 1: label "{WORD}" is no class')


def _scores(setting: RecordLevelSetting, subject: RecordLevelSubject, folder: Path) -> Finding:
    """T9: is an evaluation on held-out records refused, unless the run's settings say that scores are told?

    A client without privacy must answer the same message, as a refusal for another reason would say nothing.
    """

    def told(policy: ClientPolicy, name: str) -> bool:
        data = _Scored(setting.model.encoder, (), examples=setting.made_up[0])
        client = _client(setting, subject.runner, data, folder / name, policy)
        return not isinstance(subject.handle("evaluate", message, lambda _: client), str)

    message, may = _message(_job(setting)), setting.config.dp.metrics
    here, elsewhere = told(_policy(setting), "private"), told(ClientPolicy(), "open")
    return Finding(
        name="T9 evaluation",
        passed=elsewhere and (may or not here),
        measured=float(here),
        unit="scores told",
        allowed="any, by dp.metrics" if may else "none",
        detail="an evaluation on held-out records, asked of a client with the run's own settings; a client without "
        f"privacy {'answers' if elsewhere else 'refuses'} it",
    )


def _reasons(setting: RecordLevelSetting, subject: RecordLevelSubject, folder: Path) -> Finding:
    """T9: does of whatever goes wrong nothing but a code leave a client?"""

    def said(kind: str, error: type[Exception]) -> object:
        def fail(_: Any) -> NoReturn:
            raise error(f"{WORD} is too long")

        return subject.handle(kind, message, fail)

    message = _message(_job(setting))
    data = _Unreadable(setting.model.encoder, (), examples=setting.made_up[0])
    unreadable = _client(setting, subject.runner, data, folder, _policy(setting))
    reasons = [said(kind, error) for kind in handlers.CALLED for error in (*OURS, *OTHERS)]
    reasons.append(subject.handle("train", message, lambda _: unreadable))
    wrong = [reason for reason in reasons if str(reason) not in CODES]
    return Finding(
        name="T9 reasons",
        passed=not wrong,
        measured=float(len(wrong)),
        unit="no codes",
        allowed="none",
        detail=f"answers of a client to {len(reasons)} messages at which something goes wrong, whose sentence names a "
        "record",
    )


def _failed_twice(setting: RecordLevelSetting, subject: RecordLevelSubject, folder: Path) -> Finding:
    """T9: is a job that failed after it was charged not trained again, with other noise, when it is sent again?"""
    job = _job(setting)
    job = replace(job, training=replace(job.training, lr=TOO_FAST))
    data = MadeUpClient(setting.model.encoder, (), examples=setting.made_up[0])
    steps, charges = zip(*(_attempt(setting, subject, job, data, folder) for _ in range(2)), strict=True)
    return Finding(
        name="T9 failed twice",
        passed=not steps[1] and charges[0] == charges[1] == 1,
        measured=float(steps[1]),
        unit="more steps",
        allowed="none, one charge",
        detail=f"a job that diverges took {steps[0]} steps; sent again it took {steps[1]} more; it was charged "
        f"{charges[1]} times",
    )


def _attempt(
    setting: RecordLevelSetting, subject: RecordLevelSubject, job: Job, data: MadeUpClient, folder: Path
) -> tuple[int, int]:
    """Send a job that fails; return the steps that it took, and the charges in the ledger after it."""
    observer = StepObserver(setting.model, job, data.records, unit=1.0)
    runner = subject.runner(0, data, folder, _policy(setting), observer.on(subject.mechanism, NOWHERE))
    with suppress(FedloraError):
        runner.run(setting.model, job)
    observer.finish()
    return len(observer.steps), len(runner.ledger.charges())


def _client(
    setting: RecordLevelSetting, runner: type[JobRunner], data: MadeUpClient, folder: Path, policy: ClientPolicy
) -> ClientContext:
    """A client with these data and this policy, as its handlers know it."""
    folder.mkdir(parents=True)
    return ClientContext(setting.model, runner(0, data, folder, policy), PartStore(folder), setting.config.lora.rank)


def _policy(setting: RecordLevelSetting) -> ClientPolicy:
    """The policy of a client with the run's settings, whose updates are not masked and whose ledger is a new one."""
    return replace(policy_of(setting.config), ledgers=None, masked=False)


def _job(setting: RecordLevelSetting) -> Job:
    """The first job of a client of the audit's plan."""
    strategy = setting.strategy
    return select_rows(
        job_for(strategy, strategy.init(setting.start), setting.client, setting.plan(setting.records), 0)
    )


def _message(job: Job) -> Any:
    """The message of a job with all its parts."""
    parts = Parts().of(job)
    return codec.JobEncoder().job(job, parts, parts)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep what the client logs off the screen within the block: its failures are asked for."""
    log = logging.getLogger("fedlora")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
