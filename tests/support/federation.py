"""A federation of real processes on loopback: provisioned keys, TLS, `fedlora server` and `fedlora client`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.deployment.processes import free_port
from fedlora.deployment.provision import names_for, provision

ROOT = Path(__file__).parents[2]
SLOW = 600.0  # seconds that anything may take on a busy machine


@dataclass
class Federation:
    """Three clients and a server, in a folder."""

    folder: Path
    config: Path
    model: Path
    host: str = "localhost"  # what clients dial
    port: int = field(default_factory=free_port)
    running: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        provision(self.keys, [self.host], names_for(3))

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    def server(self, run: str, *more: str) -> "subprocess.Popen[bytes]":
        """Start the server's command; what it says is in RUN.out."""
        words = ["server", "--credentials", self.keys / "server", "--out", self.folder / run, "--config", self.config]
        words += ["--host", "127.0.0.1" if self.host == "localhost" else self.host, "--port", self.port]
        return self.start(run, [*map(str, words), *more])

    def client(self, n: int, *more: str, **env: str) -> "subprocess.Popen[bytes]":
        """Start client 1, 2 or 3; what it says is in client-N.out."""
        words = [
            "client",
            "--server",
            f"{self.host}:{self.port}",
            "--credentials",
            self.keys / "clients" / f"client-{n}",
        ]
        words += ["--state", self.state(n), "--model", self.model, "--data", self.folder / f"client_{n}.jsonl"]
        words += ["--threads", "1", "--data.holdout", "0.2", "--data.split", "sample"]  # by the seed, as a simulation
        return self.start(f"client-{n}", [*map(str, words), *more], **env)

    def state(self, n: int) -> Path:
        return self.folder / f"state-{n}"

    def start(self, name: str, words: Sequence[str], **more: str) -> "subprocess.Popen[bytes]":
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
        with (self.folder / f"{name}.out").open("ab") as out:
            command = [sys.executable, "-m", "fedlora", *words]
            told = {"env": env, "cwd": self.folder, "umask": 0o022}  # that of most machines
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **told)
        self.running.append(process)
        return process

    def said(self, name: str) -> str:
        """What a command has said so far."""
        return (self.folder / f"{name}.out").read_text()

    def records(self, run: str) -> list[dict[str, Any]]:
        """The finished rounds of a run."""
        path = self.folder / run / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def events(self, n: int) -> list[dict[str, Any]]:
        """A client's audit log."""
        path = self.state(n) / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, what: Callable[[], Any], seconds: float = SLOW) -> Any:
        """Wait for something to be so, and return it."""
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, f"not so after {seconds} s; {self.everything()}"
            time.sleep(0.1)
        return found

    def everything(self) -> str:
        """The end of all that was said, for a test that failed."""
        files = [*self.folder.glob("*.out"), *self.folder.glob("*/flower/*.log"), *self.folder.glob("*/logs/*.log")]
        return "\n".join(f"== {f.relative_to(self.folder)}\n{f.read_text(errors='replace')[-1500:]}" for f in files)

    def is_training(self, n: int, run: str, round: int) -> bool:
        """Has the client a job of this round, and has not answered yet?"""
        name = (self.folder / run / "run").read_text().strip() if (self.folder / run / "run").exists() else "none"
        jobs = [e for e in self.events(n) if e.get("round") == round and e.get("run") == name]
        return [e["event"] for e in jobs] == ["entered"]

    def end(self) -> None:
        """End all commands, as a service manager does."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(SLOW)


def below(pid: int) -> list[int]:
    """A process's children, theirs, and so on."""
    own = [child for child, parent in _parents() if parent == pid]
    return own + [other for child in own for other in below(child)]


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """kill -9 of a command and all that it started, at once, as a machine that loses power does."""
    for pid in [process.pid, *below(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def named(pid: int, word: str) -> list[int]:
    """Of the processes below, those with this word in their command line."""
    return [p for p in below(pid) if word in command_of(p)]


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        yield int(path.name), int(fields[1])


def command_of(pid: int) -> str:
    """A process's command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
