"""Processes that a command starts, watches and ends: none of them outlives it, however it dies."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fedlora.errors import ConfigError
from fedlora.storage.files import hold_lock

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "PYTHONUNBUFFERED": "1",
}
LOG = 16 * 2**20  # bytes of a log file after which the next start begins a new one
DIES = 1  # PR_SET_PDEATHSIG of Linux


class Process:
    """One program, in a session of its own, that is sent SIGTERM when this process is gone."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """`log` takes what it says; `env` is added to this process's own."""
        self.name, self._command, self._log = name, list(command), log
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self._env = os.environ | QUIET | _no_proxy() | {"PATH": path} | dict(env or {})  # Flower starts its own by name
        self._child: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._since, self._short = 0.0, 0

    def start(self) -> None:
        """Start it, or start it again. Raises `ConfigError` where there is no such program."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG:
            self._log.replace(self._log.with_name(f"{self._log.name}.1"))
        with self._log.open("ab") as out:
            self._child = self._open(out)
        self.starts += 1
        self._since = time.monotonic()

    def pause(self) -> float:
        """Seconds to wait before it is started again: few, but more each time that it lived for less than a minute."""
        self._short = self._short + 1 if time.monotonic() - self._since < 60 else 0
        return min(2.0**self._short, 30.0)

    def _open(self, out: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
                preexec_fn=_follow if sys.platform == "linux" else None,
            )
        except OSError as e:
            raise ConfigError(f"{self._command[0]} cannot be started: {e.strerror}; is it installed here?") from e

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    @property
    def code(self) -> int | None:
        """Its exit code; none while it runs, or before it was started."""
        return self._child.poll() if self._child else None

    @property
    def alive(self) -> bool:
        return self._child is not None and self.code is None

    def last_words(self, n: int = 3) -> str:
        """The end of its log, for a message."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return " | ".join(line.strip() for line in lines[-n:] if line.strip())

    def signal(self, what: signal.Signals) -> None:
        """Send a signal to it and to all that it started."""
        if self._child:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, what)


class Tail:
    """What others write to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = path.stat().st_size if path.exists() else 0

    def new(self) -> str:
        """All whole lines since the last time; of a file that was begun anew, all it has."""
        if not self._path.exists():
            return ""
        if self._path.stat().st_size < self._seen:
            self._seen = 0
        with self._path.open("rb") as f:
            f.seek(self._seen)
            new = f.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._seen += len(whole)
        return whole.decode(errors="replace")

    def show(self) -> None:
        """The same, on the screen."""
        sys.stdout.write(self.new())
        sys.stdout.flush()


def stop(processes: Sequence[Process], grace: float = 5.0) -> None:
    """End them all, the last that was started first; those that are still there after `grace` seconds are killed."""
    for process in reversed(processes):
        process.signal(signal.SIGTERM)
    end = time.monotonic() + grace
    while any(p.alive for p in processes) and time.monotonic() < end:
        time.sleep(0.05)
    for process in processes:
        process.signal(signal.SIGKILL)  # whatever is left of its group


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The only process in this folder. Raises `ConfigError` where another one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / "lock", wait=False):
        yield


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def wait_for_port(port: int, process: Process, host: str = "127.0.0.1", seconds: float = 60.0) -> None:
    """Until something listens there. Raises `ConfigError` with the process's last words where it ends before that."""
    end = time.monotonic() + seconds
    while process.alive and time.monotonic() < end:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            if process.alive:
                return
        time.sleep(0.1)
    raise ConfigError(f"{process.name} does not listen on port {port}: {process.last_words(1) or 'it said nothing'}")


def home(folder: Path) -> dict[str, str]:
    """Where Flower keeps what it unpacks, if nobody has said: not among the user's own files."""
    return {} if "FLWR_HOME" in os.environ else {"FLWR_HOME": str((folder / "home").absolute())}


def is_alive(pid: int, name: str) -> bool:
    """Is there a process of this number, whose command line has this name in it?"""
    try:
        return name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def kill_marked(name: str, variable: str, value: str) -> None:
    """Kill the processes with this name in their command line and this variable in their environment, whoever's."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            marks = (path / "environ").read_bytes().split(b"\0")
            if f"{variable}={value}".encode() in marks and name.encode() in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)


def program(name: str) -> str:
    """A console script of this installation."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _follow() -> None:
    """In the child: be sent SIGTERM when the parent is gone, by whatever signal."""
    ctypes.CDLL(None).prctl(DIES, signal.SIGTERM)


def _no_proxy() -> dict[str, str]:
    """A proxy of the site's is not for what runs on this machine."""
    known = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    whole = ",".join(filter(None, (known, "127.0.0.1", "localhost")))
    return {"NO_PROXY": whole, "no_proxy": whole}
