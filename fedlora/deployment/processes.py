"""Processes that a command starts, watches and ends: none of them outlives the command, however that dies."""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

import psutil

from fedlora.environment import QUIET, WAITING, no_proxy
from fedlora.errors import ConfigError
from fedlora.storage.files import hold_lock

from .addresses import join_address

FOR_CHILDREN = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "PYTHONUNBUFFERED": "1"}
LOG = 16 * 2**20  # bytes of a log file from which on a new file is begun
LINE = 2**16  # bytes that are taken in at once of a line without end
SOCKET_PATH = 107  # bytes that the path of a Unix socket may have on Linux
PR_SET_PDEATHSIG = 1  # of Linux' prctl
FOR_TERMINALS = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]"  # colours and movements of the cursor
    rb"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles of windows
    rb"|\x1b.?|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=\n)"
)


class Process:
    """A program that runs in a session of its own, and is sent SIGTERM when this process is gone."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Write the program's output to `log`; add `env` to the environment that this process has."""
        self.name, self._command, self._log = name, list(command), log
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        known, quiet = WAITING | os.environ, QUIET | FOR_CHILDREN | no_proxy()
        self._env = known | quiet | {"PATH": path} | dict(env or {})  # PATH: Flower starts its own by name
        self._child: psutil.Popen | None = None
        self._copier: Thread | None = None
        self.started = 0.0  # by time.monotonic()
        self._short_lives = 0  # one after another

    def start(self) -> None:
        """Start the program, or start it again. Raises `ConfigError` where there is no such program."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.touch()
        self._child = self._open()
        self._copier = Thread(target=_copy_lines, args=(self._child.stdout, self._log), daemon=True)
        self._copier.start()
        self.started = time.monotonic()

    def pause(self) -> float:
        """Seconds to wait before the next start: few, but more each time that the program ran less than a minute."""
        lived = time.monotonic() - self.started
        self._short_lives = self._short_lives + 1 if lived < 60 else 0
        return min(2.0**self._short_lives, 30.0)

    def _open(self) -> psutil.Popen:
        try:
            return psutil.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=_follow if sys.platform == "linux" else None,
            )
        except OSError as e:
            raise ConfigError(f"{self._command[0]} cannot be started: {e.strerror}; is it installed here?") from e

    @property
    def pid(self) -> int:
        """The number of the process; 0 before the first start."""
        return int(self._child.pid) if self._child else 0

    @property
    def code(self) -> int | None:
        """The exit code; none while the program runs, or before its first start."""
        code: int | None = self._child.poll() if self._child else None
        return code

    @property
    def alive(self) -> bool:
        """Is the program running?"""
        return self._child is not None and self.code is None

    def log_tail(self, n: int = 3) -> str:
        """The last `n` lines of the log in one line, for a message."""
        if self._copier and not self.alive:
            self._copier.join(1)  # what the program started may hold its output open for longer
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return " | ".join(line.strip() for line in lines[-n:] if line.strip())

    def ports(self) -> set[int]:
        """The TCP ports that the program listens on."""
        try:
            connections = self._child.net_connections("tcp") if self._child else []
        except psutil.Error:
            return set()
        return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to the program and to all that the program started, even if the program itself is gone."""
        if self._child:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, what)

    def wait(self, timeout: float) -> None:
        """Wait until the program has ended, for at most `timeout` seconds."""
        if self._child:
            psutil.wait_procs([self._child], timeout)


def _copy_lines(source: IO[bytes], log: Path) -> None:
    """Append all that comes to the log, line by line, without what only a terminal understands.

    What cannot be written is dropped: a program must not wait for a full disk of ours.
    """
    with source:
        for line in iter(lambda: source.readline(LINE), b""):
            with suppress(OSError):
                _append(log, FOR_TERMINALS.sub(b"", line).replace(b"\r", b"\n"))


def _append(log: Path, line: bytes) -> None:
    if log.exists() and log.stat().st_size > LOG:
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("ab") as out:
        out.write(line)


class Tail:
    """Reads what others add to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = path.stat().st_size if path.exists() else 0

    def new(self) -> str:
        """The whole lines that were added since the last call; of a file that was begun anew, all its lines."""
        if not self._path.exists():
            return ""
        if self._path.stat().st_size < self._seen:
            self._seen = 0
        with self._path.open("rb") as f:
            f.seek(self._seen)
            new = f.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._seen += len(whole)
        return FOR_TERMINALS.sub(b"", whole).decode(errors="replace")  # the other side has a say in some lines

    def show(self) -> str:
        """Print the lines that were added since the last call, and return them."""
        new = self.new()
        sys.stdout.write(new)
        sys.stdout.flush()
        return new


def stop(processes: Sequence[Process], grace: float = 5.0) -> None:
    """End the processes, the one that was started last first; kill those that still run after `grace` seconds."""
    for process in reversed(processes):
        process.signal(signal.SIGTERM)
    end = time.monotonic() + grace
    for process in processes:
        process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        process.signal(signal.SIGKILL)  # for whatever is left of the group


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only fedlora process in this folder. Raises `ConfigError` where another one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "lock", wait=False):
        yield


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the port; for the host "::" it takes IPv4 too. Raises `ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=256, dualstack_ipv6=both)
    except (OSError, OverflowError) as e:
        why = getattr(e, "strerror", None) or e
        raise ConfigError(f"cannot listen on {join_address(host, port)}: {why}; choose another --port or --host") from e


def wait_for_port(port: int, process: Process, seconds: float = 60.0) -> None:
    """Wait until the process itself listens on the port: another program may hold the port.

    Raises `ConfigError` with the last line of a process that ended.
    """
    end = time.monotonic() + seconds
    while process.alive and time.monotonic() < end:
        if port in process.ports():
            return
        time.sleep(0.1)
    why = process.log_tail(1).removeprefix("error: ") or "it said nothing"
    raise ConfigError(f"{process.name} does not listen on port {port}: {why}")


def flwr_home(folder: Path) -> dict[str, str]:
    """The environment variable for where Flower unpacks apps: in `folder`, unless the user has set the variable."""
    return {} if "FLWR_HOME" in os.environ else {"FLWR_HOME": str((folder / "home").absolute())}


def is_alive(pid: int, name: str) -> bool:
    """Is there a process with this number and with this name in its command line?"""
    try:
        return _is_named(psutil.Process(pid).cmdline(), name)
    except psutil.Error:
        return False


def kill_marked(name: str, variable: str, value: str) -> None:
    """Kill all processes that have this name in their command line and this variable in their environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # a process that ended meanwhile, or that this user may not look at
            if process.environ().get(variable) == value and _is_named(process.cmdline(), name):
                process.kill()


def _is_named(command: Sequence[str], name: str) -> bool:
    return any(name in word for word in command)


def program(name: str) -> str:
    """The path of a console script that was installed with fedlora; its bare name where there is none."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _follow() -> None:
    """In the child: have the kernel send SIGTERM when the parent is gone, whatever ended the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def scratch_folder(longest: int) -> Iterator[Path]:
    """A new folder that only its owner can open, and in which a socket's name may have `longest` bytes.

    The folder is removed at the end.
    """
    base = tempfile.gettempdir()
    example = f"{base}/fedlora-12345678/"  # as long as what mkdtemp makes
    too_long = len(example) + longest > SOCKET_PATH
    path = Path(tempfile.mkdtemp(prefix="fedlora-", dir="/tmp" if too_long else base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
