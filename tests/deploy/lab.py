"""A federation on this machine for experiments: `fedlora server`, and clients behind a proxy each.

Every client reaches the server through a TCP proxy of its own, which can stop forwarding: bytes under way are held, as
TCP would send them again, and new connections hang. All that was started ends with `Federation.stop`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

from proxy import Proxy
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FEDLORA = [sys.executable, "-m", "fedlora"]
NAMES = ("client-1", "client-2", "client-3")
ROUND = 600.0  # seconds that a round may take on a busy machine, failures of Flower's own included


class Late(Exception):
    """What was waited for did not happen."""


def until(what: str, holds: Callable[[], Any], seconds: float = ROUND) -> Any:
    """Wait until it holds, and give what it gave. Raises `Late`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.1)
    raise Late(f"not within {seconds:.0f} s: {what}")


def processes() -> dict[int, tuple[int, str]]:
    """All that run: parent and command line by process id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(stat.parent.name)] = int(fields[1]), command
    return found


def below(pid: int, name: str = "") -> list[int]:
    """The processes that this one started, and those they started, with this name in their command line."""
    known, found = processes(), [pid]
    for parent in found:
        found += [p for p, (q, _) in known.items() if q == parent]
    return [p for p in found[1:] if name in known[p][1]]


def memory(pid: int, what: str = "VmHWM") -> float:
    """The most memory that a process had so far, in MB."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) / 1e3
    return 0.0


@dataclass
class Command:
    """One `fedlora` command, and what it says."""

    arguments: Sequence[str]
    out: Path
    env: dict[str, str] = field(default_factory=dict)
    child: subprocess.Popen[bytes] | None = None

    def start(self, program: Sequence[str] = FEDLORA) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | self.env
        command = [*program, *self.arguments]
        with self.out.open("ab") as out:
            self.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT)

    @property
    def pid(self) -> int:
        return self.child.pid if self.child else 0

    @property
    def code(self) -> int | None:
        return self.child.poll() if self.child else None

    def said(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def kill(self, name: str = "") -> None:
        """kill -9: of those of its processes that have this name, or of the command itself, without its children."""
        for pid in below(self.pid, name) if name else [self.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not name and self.child:
            self.child.wait()

    def stop(self) -> None:
        """SIGTERM, and kill -9 of whatever is still there 15 s later."""
        if not self.child:
            return
        left = below(self.pid)
        self.child.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(15)
        for pid in [self.pid, *left]:
            if pid == self.pid and self.child.poll() is not None:
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()


class Federation:
    """A server and three clients, with TLS and keys."""

    def __init__(self, folder: Path, port: int, settings: Sequence[str], small: Sequence[str] = ()) -> None:
        """`small`: those of "run", "state-1", ... that are to lie on a disk of their own that can be filled."""
        self.folder, self.run, self._mounts = folder, folder / "run", [folder / name for name in small]
        folder.mkdir(parents=True)
        for mount in self._mounts:
            mount.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(mount)], check=True)
        provision = ["provision", "--out", str(folder / "creds"), "--host", "localhost", "--clients", "3"]
        subprocess.run([*FEDLORA, *provision], check=True, capture_output=True, cwd=ROOT)
        self.proxies = [Proxy(port + 1 + i, port) for i in range(3)]
        common = ["server", "--credentials", str(folder / "creds/server"), "--out", str(self.run)]
        listen = ["--port", str(port), "--host", "127.0.0.1"]
        self.server = Command([*common, *listen, *settings], folder / "server.out")
        self.clients = [self.client(i, folder / f"state-{i + 1}") for i in range(3)]
        self._ended = Event()
        Thread(target=self._collect, daemon=True).start()

    def client(self, i: int, state: Path, *more: str) -> Command:
        """The command of a client, not started."""
        keys = ["--credentials", str(self.folder / "creds/clients" / NAMES[i]), "--state", str(state)]
        server = ["client", "--server", f"localhost:{self.proxies[i].port}"]
        return Command([*server, *keys, *more], self.folder / f"{state.name}.out")

    def start(self) -> None:
        for command in (self.server, *self.clients):
            command.start()

    def stop(self) -> None:
        """End it all, and give back the disks."""
        self._ended.set()
        for command in (*self.clients, self.server):
            command.stop()
        for proxy in self.proxies:
            proxy.close()
        for mount in self._mounts:
            subprocess.run(["umount", "-l", str(mount)], check=False)

    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl."""
        path = self.run / "rounds.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_round(self, n: int, seconds: float = ROUND) -> dict[str, Any]:
        """The line of round n. Raises `Late`, at once where the server has ended."""

        def there() -> dict[str, Any] | None:
            line = next((r for r in self.rounds() if r["round"] == n), None)
            if not line and self.server.code is not None:
                raise Late(f"the server ended with code {self.server.code} before round {n}: {self.log_tail()}")
            return line

        found: dict[str, Any] = until(f"round {n}", there, seconds)
        return found

    def wait_job(self, i: int, n: int, seconds: float = ROUND) -> None:
        """Until client i is at the work of round n."""
        until(f"client {i} at the job of round {n}", lambda: self.entered(i, n), seconds)

    def entered(self, i: int, n: int) -> int:
        """How often round n's job came to client i."""
        return sum(e["event"] == "entered" and e.get("round") == n for e in self.audit(self.folder / f"state-{i + 1}"))

    def audit(self, folder: Path) -> Iterator[dict[str, Any]]:
        path = folder / "audit.jsonl"
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError):
                yield json.loads(line)

    def log_tail(self) -> str:
        lines = [line.strip(" │╭╮╰╯─") for line in self.server.said().splitlines()]
        return " ".join([line for line in lines if line][-3:])

    def kept(self, n: int) -> Path:
        """Round n's checkpoint, as it was when it was new."""
        return self.folder / "checkpoints" / f"round-{n:06d}.safetensors"

    def _collect(self) -> None:
        """Copy each checkpoint, as the run keeps two."""
        into = self.folder / "checkpoints"
        into.mkdir()
        while not self._ended.wait(0.2):
            for path in sorted((self.run / "checkpoint").glob("round-*.safetensors")):
                if not (into / path.name).exists():
                    with suppress(OSError):
                        shutil.copyfile(path, into / f".{path.name}")
                        (into / f".{path.name}").replace(into / path.name)


def difference(a: Path, b: Path) -> float:
    """The largest absolute difference between two files' numbers; infinite where they are not of the same shapes.

    A checkpoint's records of its rounds are left out: they hold times.
    """
    one, two = ({k: t for k, t in load_file(path).items() if k != "records"} for path in (a, b))
    if {k: t.shape for k, t in one.items()} != {k: t.shape for k, t in two.items()}:
        return float("inf")
    return max(float((t.double() - two[k].double()).abs().max()) if t.numel() else 0.0 for k, t in one.items())


def fill(folder: Path) -> Path:
    """Leave no room on the disk of a folder; the file that took it."""
    path = folder / "filler"
    with suppress(OSError), path.open("wb", buffering=0) as f:
        while f.write(bytes(1 << 16)):
            pass
    with suppress(OSError), path.open("ab", buffering=0) as f:
        while f.write(bytes(512)):
            pass
    return path


def cut_short(path: Path) -> None:
    """Half of a file, as a disk that lost power may leave it."""
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.with_name(".cut").write_bytes(half)
    path.with_name(".cut").replace(path)
