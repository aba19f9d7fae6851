"""Processes that a command starts do not outlive it, and say why they ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedlora.deployment.processes import (
    Process,
    Tail,
    exclusive,
    free_port,
    is_alive,
    kill_marked,
    listen,
    scratch_folder,
    stop,
    wait_for_port,
)
from fedlora.errors import ConfigError

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
PARENT = """
import sys, time
from pathlib import Path
from fedlora.deployment.processes import Process
child = Process("child", [sys.executable, "-c", "import time; time.sleep(601)"], Path(sys.argv[1]))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_child_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], env=env, stdout=-1, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not is_alive(child, "sleep(601)"))


def test_stop_ends_what_a_process_has_started_too(tmp_path: Path) -> None:
    process = Process("two", ["sh", "-c", "sleep 602 & sleep 602"], tmp_path / "log")
    process.start()
    stop([process])
    assert not process.alive
    until(lambda: not [pid for pid in psutil.pids() if is_alive(pid, "602")])


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    process = Process("deaf", [sys.executable, "-c", code], tmp_path / "log")
    process.start()
    until(lambda: process.log_tail() == "x")
    stop([process], grace=0.3)
    until(lambda: not process.alive)


def test_its_end_is_told_with_its_last_words(tmp_path: Path) -> None:
    process = Process("short", [sys.executable, "-c", "print('no port'); raise SystemExit(3)"], tmp_path / "log")
    process.start()
    with pytest.raises(ConfigError, match="short does not listen on port 1: no port"):
        wait_for_port(1, process)
    assert process.code == 3 and [process.pause() for _ in range(3)] == [2.0, 4.0, 8.0]


def test_another_programs_listener_is_not_taken_for_the_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as others:
        process = Process("gate", [sys.executable, "-c", "import time; time.sleep(2)"], tmp_path / "log")
        process.start()
        with pytest.raises(ConfigError, match="gate does not listen"):
            wait_for_port(others.getsockname()[1], process)


def test_a_process_is_waited_for_until_it_listens_itself(tmp_path: Path) -> None:
    port = free_port()
    code = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    process = Process("gate", [sys.executable, "-c", code], tmp_path / "log")
    process.start()
    wait_for_port(port, process)
    assert process.ports() == {port}
    stop([process])


def test_a_taken_port_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use.*--port"):
            listen("127.0.0.1", port)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_of_ipv6_takes_ipv4_too() -> None:
    with listen("::", 0) as both:
        port = both.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=10).close()


def test_a_log_has_no_colours_and_no_movements_of_a_cursor(tmp_path: Path) -> None:
    code = r"print('\x1b[92mINFO \x1b[0m: a\x1b[2K\x1b]0;title\x07b\r\n10%\r20%')"
    process = Process("coloured", [sys.executable, "-c", code], tmp_path / "log")
    process.start()
    process.wait(60)
    assert process.log_tail() == "INFO : ab | 10% | 20%"
    assert (tmp_path / "log").read_bytes() == b"INFO : ab\n10%\n20%\n"


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-program cannot be started"):
        Process("none", ["no-such-program"], tmp_path / "log").start()


def test_two_are_not_at_work_in_one_folder(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(ConfigError, match="another fedlora is at work in"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_marked_processes_are_killed_and_others_are_not(tmp_path: Path) -> None:
    processes = [Process(n, SLEEP, tmp_path / n, {"FEDLORA_TEST_MARK": f"{tmp_path}/{n}"}) for n in ("one", "two")]
    for process in processes:
        process.start()
        until(lambda process=process: process.log_tail() == "here")  # type: ignore[misc]
    kill_marked("time.sleep", "FEDLORA_TEST_MARK", f"{tmp_path}/one")
    until(lambda: not processes[0].alive)
    assert processes[1].alive
    stop(processes)


def test_whole_lines_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "screen"
    path.write_text("before\n")
    tail = Tail(path)
    with path.open("a") as f:
        f.write("one\ntw")
    tail.show()
    with path.open("a") as f:
        f.write("o\n")
    tail.show()
    assert capsys.readouterr().out == "one\ntwo\n"


def test_nothing_that_is_shown_commands_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tail = Tail(tmp_path / "screen")
    (tmp_path / "screen").write_bytes(b"a\x1b[2J\x1b]0;owned\x07b\x9b2J\n")
    tail.show()
    assert "\x1b" not in (said := capsys.readouterr().out) and said.startswith("ab")


def test_a_free_port_is_free() -> None:
    assert free_port() != free_port()


def test_a_scratch_folder_is_its_owners_has_room_for_a_sockets_name_and_is_removed() -> None:
    with scratch_folder(66) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700 and len(f"{folder}/") + 66 <= 107
        (folder / "file").touch()
    assert not folder.exists()


@pytest.mark.parametrize("room", [11, 95])
def test_a_scratch_folder_lies_in_tmp_where_the_usual_place_has_too_long_a_name(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with scratch_folder(room) as folder:
        assert folder.parent == Path("/tmp")
