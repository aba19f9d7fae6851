"""Several processes on one ledger, and processes that are killed at any of its writes."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from fedlora.client.runner import JobRunner
from fedlora.errors import PrivateJobFailed
from fedlora.jobs import Update
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import STANDARD
from fedlora.sections import Training
from fedlora.strategy import Job
from tests.client.test_ledger import NONE, TERMS, opened, update
from tests.client.test_runner import SMALL, job, runner
from tests.support.forked import FORKS, preload

RACES = 60
preload(__name__, "tests.support.remembered_epsilon")


def in_process(work: Callable[..., None], *args: Any) -> int:
    """Do the work in a process of its own; return its exit code."""
    process = FORKS.Process(target=work, args=args)
    process.start()
    process.join()
    return process.exitcode or 0


def race(folder: Path, name: str, start: Barrier) -> None:
    ledger = opened(folder)
    for n in range(RACES):
        start.wait()
        ledger.charge(f"{name} {n}", TERMS, round=n, budget=NONE)
        ledger.keep(f"{name} {n}", update())


def test_two_processes_on_one_ledger_lose_no_charge(tmp_path: Path) -> None:
    start = FORKS.Barrier(2)
    racers = [FORKS.Process(target=race, args=(tmp_path, name, start)) for name in ("a", "b")]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert len(opened(tmp_path).charges()) == 2 * RACES


def do_at_once(folder: Path, start: Barrier) -> None:
    start.wait()
    send(folder, runner(folder).run(SMALL.model, job()))


def send(folder: Path, answer: Update) -> None:
    """Note what left the machine: a number of the update says which noise it has."""
    with (folder / "sent").open("a") as f:
        f.write(f"{float(answer.lora.B['transformer.h.0.attn.c_attn'].double().sum()):.17g}\n")


def test_a_job_that_two_processes_are_sent_has_one_answer_and_one_charge(tmp_path: Path) -> None:
    start = FORKS.Barrier(2)
    workers = [FORKS.Process(target=do_at_once, args=(tmp_path, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sent = (tmp_path / "sent").read_text().splitlines()
    assert len(sent) == 2 and len({*sent}) == 1 and len(runner(tmp_path).ledger.charges()) == 1


def killed_at(write: int) -> None:
    """Have this process killed at its n-th durable write, just before or after it."""
    left, sync = [write], os.fsync

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def work_and_be_killed(folder: Path, write: int, failing: bool, known: dict[Any, preflight.Findings]) -> None:
    """Work in a process that is killed at a durable write, and that knows what was found of its model before."""
    preflight._passed[SMALL.model] = known
    killed_at(write)
    work(folder, failing)


def work(folder: Path, failing: bool) -> None:
    """Do the first job, the second, and the first again, as a server asks that forgot."""
    client = runner(folder)
    for t in (0, 1, 0):
        try:
            send(folder, (_failing(client) if failing and t == 0 else client).run(SMALL.model, job(t)))
        except PrivateJobFailed:
            with (folder / "sent").open("a") as f:
                f.write(f"failure {t}\n")


def _failing(client: JobRunner) -> JobRunner:
    """The same client, whose training fails after its last step."""

    def source(*_: Any) -> Any:
        raise ZeroDivisionError

    return replace(client, mechanism=replace(STANDARD, source=source))


@pytest.mark.parametrize("failing", [False, True])
def test_a_client_that_is_killed_at_any_write_never_sends_more_than_it_was_charged_for(
    tmp_path: Path, failing: bool
) -> None:
    """Each is killed in a process of its own; what goes on from its files knows nothing else of it."""
    preflight.check_once(SMALL.model, job())
    for write in count(1):
        folder = tmp_path / str(write)
        folder.mkdir()
        known = preflight._passed[SMALL.model]
        if in_process(work_and_be_killed, folder, write, failing, known) != -signal.SIGKILL:
            break
        work(folder, failing)
        releases = {*(folder / "sent").read_text().splitlines()}
        assert len(releases) <= len(runner(folder).ledger.charges()), f"killed at write {write}"
    assert write > 20


def test_whatever_goes_wrong_after_the_charge_is_one_sentence_and_stays_it(tmp_path: Path) -> None:
    with pytest.raises(PrivateJobFailed) as first:
        _failing(runner(tmp_path)).run(SMALL.model, job())
    with pytest.raises(PrivateJobFailed) as second:
        runner(tmp_path).run(SMALL.model, job())  # it would succeed now
    assert str(first.value) == str(second.value) and "Zero" not in str(first.value)
    assert len(runner(tmp_path).ledger.charges()) == 1


def test_an_adapter_that_is_not_finite_is_no_free_look(tmp_path: Path) -> None:
    """Once it was answered and trained again with fresh noise, as often as the server asked."""
    diverging: Job = replace(job(), training=Training(optimizer="sgd", lr=3e38, batch_size=4))
    for _ in range(3):
        with pytest.raises(PrivateJobFailed):
            runner(tmp_path).run(SMALL.model, diverging)
    assert [e["kind"] for e in runner(tmp_path).ledger._entries()] == ["charge", "failed"]
