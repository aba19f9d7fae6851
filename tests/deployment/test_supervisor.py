"""What ends is started again, later each time; all ends at the end; a reason to give up is passed on."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.deployment.processes import Process
from fedlora.deployment.supervisor import Restart, Supervisor, restart_later
from fedlora.errors import ConfigError

ENDS = [sys.executable, "-c", "print('here', flush=True); raise SystemExit(3)"]
STAYS = [sys.executable, "-c", "import time; time.sleep(600)"]


def soon(process: Process) -> Restart:
    return Restart(f"code {process.code}", pause=0.2)


def until(supervisor: Supervisor, is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        supervisor.look()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_ended_is_started_again_and_told_once_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    with Supervisor(soon) as supervisor:
        supervisor.start(Process("short", ENDS, log))
        until(supervisor, lambda: log.read_text().count("here") == 3)
    assert capsys.readouterr().out.splitlines()[:2] == ["short ended: code 3; started again in 0 s"] * 2


def test_it_stays_down_for_its_pause(tmp_path: Path) -> None:
    process = Process("short", ENDS, tmp_path / "log")
    with Supervisor(lambda _: Restart("asked", pause=600)) as supervisor:
        supervisor.start(process)
        until(supervisor, lambda: process.code == 3)
        for _ in range(5):
            supervisor.look()
        assert not process.alive and (tmp_path / "log").read_text() == "here\n"


def test_what_lives_is_left_alone_and_all_are_ended_at_the_end(tmp_path: Path) -> None:
    processes = [Process(name, STAYS, tmp_path / name) for name in ("one", "two")]
    with Supervisor() as supervisor:
        for process in processes:
            supervisor.start(process)
        pids = [process.pid for process in processes]
        supervisor.look()
        assert [process.pid for process in processes] == pids and all(process.alive for process in processes)
    until(supervisor, lambda: not any(process.alive for process in processes))


def test_a_reason_to_give_up_ends_all(tmp_path: Path) -> None:
    def give_up(process: Process) -> Restart:
        raise ConfigError(process.log_tail())

    stays = Process("stays", STAYS, tmp_path / "stays")
    with pytest.raises(ConfigError, match="here"), Supervisor(give_up) as supervisor:
        supervisor.start(stays)
        supervisor.start(Process("short", ENDS, tmp_path / "log"))
        until(supervisor, lambda: False)
    assert not stays.alive


def test_the_pause_grows_while_a_process_is_short_lived(tmp_path: Path) -> None:
    process = Process("short", ENDS, tmp_path / "log")
    process.start()
    process.wait(60)
    assert [restart_later(process) for _ in range(3)] == [Restart("code 3", pause) for pause in (2.0, 4.0, 8.0)]
