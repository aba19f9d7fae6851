"""`fedlora client`: a SuperNode, its SuperExec and a warm worker, watched and started again as long as it is wanted.

    server ◀─TLS─ SuperNode ◀─ SuperExec ──▶ ClientApp, a new one a message ──Unix socket──▶ worker (model, data, state)

The SuperNode only dials out. Each message's ClientApp is a stub; the worker alone holds the data, and nothing but the
typed messages of worker.proto reaches it.
"""

import json
import os
import shutil
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx

from fedlora.client.deployment.health import is_serving
from fedlora.deployment.processes import Process, Tail, alone, free_port, home, program, stop
from fedlora.deployment.provision import read_client
from fedlora.errors import ConfigError

CLOCK = 5.0  # seconds that this machine's clock may be behind the server's, for Flower's signatures
AHEAD = 300.0  # and ahead of it
HANGS = 300.0  # seconds without a sign of life after which a worker is started again
REFUSED = ("2004", "2001")  # what Flower says of a key: it is not known, or in use
GIVES_UP = "SSL/TLS handshake error detected"  # and Flower's SuperNode then hangs, for ever
PORT = 8443
MISTAKE = 2  # exit code of a worker whose settings or data are wrong


@dataclass(frozen=True)
class Asked:
    """What `fedlora client` was asked for."""

    server: str  # host:port
    credentials: Path | None  # this client's folder of `fedlora provision`; none: no TLS and no key
    state: Path
    id: int
    name: str
    settings: Mapping[str, Any]  # its own
    worker: Path | None = None  # the socket of one that is started elsewhere
    cold: bool = False  # none: the model is loaded for every message, and takes no memory between them

    @property
    def url(self) -> str:
        return f"{'https' if self.credentials else 'http'}://{self.server}"


def asked(server: str, credentials: Path | None, state: Path, id: int | None, settings: Mapping[str, Any]) -> Asked:
    """What was asked for, checked. Raises `ConfigError` for what does not go together."""
    if credentials:
        who = read_client(credentials)
        if id not in (None, who.id):
            raise ConfigError(f"--id {id}: the keys in {credentials} are those of {who.name}, number {who.id}")
        address = server or who.server
        return Asked(_address(address), credentials, state, who.id, who.name, settings)
    if id is None:
        raise ConfigError("without keys a client needs a number of its own: --id 0")
    return Asked(_address(server), None, state, id, f"client {id}", settings)


def serve(asked: Asked) -> None:
    """Take part until SIGTERM or Ctrl-C."""
    with alone(asked.state), _scratch() as scratch:
        if not asked.credentials:
            print("INSECURE: no TLS, no key: anyone on the way can read and change what is sent. For trials only.")
        watch = Watch(asked, asked.worker or scratch / "worker.sock", scratch)
        try:
            watch.run()
        finally:
            stop(watch.processes)


def reachable(asked: Asked, meanwhile: Callable[[], None]) -> None:
    """Wait until the server answers; say why it does not. Raises `ConfigError` for what waiting does not mend."""
    pause, verify = 1.0, _context(asked)
    while True:
        try:
            answer = httpx.get(f"{asked.url}/health", verify=verify, timeout=10, trust_env=False)
            break
        except httpx.HTTPError as e:
            if "CERTIFICATE_VERIFY_FAILED" in str(e):
                raise ConfigError(
                    f"{asked.server} has a certificate that {asked.credentials}/ca.crt does not vouch for, or not for "
                    f"this name ({e}); ask whoever runs the server for the right ca.crt and host"
                ) from e
            print(f"{asked.server} does not answer ({type(e).__name__}); trying again in {pause:.0f} s", flush=True)
        end = time.monotonic() + pause
        while time.monotonic() < end:
            meanwhile()
            time.sleep(0.3)
        pause = min(2 * pause, 30.0)
    if date := answer.headers.get("date"):
        ahead = time.time() - parsedate_to_datetime(date).timestamp()
        if not -CLOCK - 1 <= ahead <= AHEAD:
            print(
                f"WARNING: this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the "
                "server's, and its signature is not taken; set the clock (NTP)",
                flush=True,
            )


def told(asked: Asked) -> str:
    """Who the client is and what is its own, for its worker."""
    return json.dumps({"id": asked.id, "state": str(asked.state.absolute()), "settings": dict(asked.settings)})


def worker_command(asked: Asked, socket: Path) -> list[str]:
    """The command line of the worker that belongs to this client."""
    return [sys.executable, "-m", "fedlora", "worker", "--socket", str(socket), "--told", told(asked)]


@dataclass
class Watch:
    """A client's processes."""

    asked: Asked
    socket: Path
    scratch: Path
    processes: list[Process] = field(default_factory=list)
    _again: dict[str, float] = field(default_factory=dict)  # process -> when it is started again
    _alive: float = 0.0  # when the worker last gave a sign of life

    def run(self) -> None:
        """Start them, and start again what dies."""
        logs, port, flower = self.asked.state / "logs", free_port(), home(self.asked.state)
        screen, words = Tail(logs / "screen.log"), Tail(logs / "supernode.log")
        secret = self.scratch / "superexec.secret"
        secret.write_text(token_hex(32))
        node = Process("SuperNode", self._node(port, secret), logs / "supernode.log", flower)
        command = [program("flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        superexec = Process(
            "SuperExec", [*command, "--superexec-auth-secret-file", str(secret)], logs / "superexec.log"
        )
        self.processes = [node, superexec]
        if not (self.asked.worker or self.asked.cold):
            worker = Process("worker", worker_command(self.asked, self.socket), logs / "worker.log")
            self.processes.insert(0, worker)
        self.processes[0].start()  # the worker: it says at once what is wrong with the data
        reachable(self.asked, self._revive)
        for process in self.processes[1:]:
            process.start()
        self._alive = time.monotonic()
        print(f"{self.asked.name} takes part at {self.asked.server}; logs in {logs}", flush=True)
        while True:
            time.sleep(0.3)
            screen.show()
            if GIVES_UP in words.new():
                print("SuperNode gave up on a connection that broke off; it is started again", flush=True)
                stop([node], grace=5)
            self._revive()
            self._look_at_worker()

    def _node(self, port: int, secret: Path) -> list[str]:
        asked = self.asked
        config = f"partition-id={asked.id} worker='{self.socket}'"
        if asked.cold:
            (self.scratch / "told.json").write_text(told(asked))
            config = f"partition-id={asked.id} cold='{self.scratch / 'told.json'}'"
        command = [program("flower-supernode"), "--superlink", asked.server, "--isolation", "process"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", config]
        command += ["--superexec-auth-secret-file", str(secret)]
        if folder := asked.credentials:
            command += ["--root-certificates", str(folder / "ca.crt")]
            command += ["--auth-supernode-private-key", str(folder / "client.key")]
        else:
            command += ["--insecure"]
        return command

    def _revive(self) -> None:
        for process in self.processes:
            if process.alive or not process.starts:
                continue
            if process.name == "worker" and process.code == MISTAKE:
                raise ConfigError(process.last_words(1).removeprefix("error: "))
            due = self._again.get(process.name)
            if due is None:
                why, pause = self._why(process)
                print(f"{process.name} ended: {why}; started again in {pause:.0f} s", flush=True)
                self._again[process.name] = time.monotonic() + pause
            elif time.monotonic() >= due:
                del self._again[process.name]
                process.start()
                self._alive = time.monotonic()

    def _why(self, process: Process) -> tuple[str, float]:
        """In words, and how long to wait: the SuperLink takes no key that it believes to be online still."""
        words = process.last_words(15)
        if process.name == "SuperNode" and any(f"code: {code}]" in words for code in REFUSED):
            return (
                "the server does not take this key: it was here less than a minute ago, or is not registered, or this "
                "machine's clock is wrong",
                10.0,
            )
        return f"code {process.code}", process.pause()

    def _look_at_worker(self) -> None:
        """One that hangs is killed; `_revive` starts it again."""
        now = time.monotonic()
        if self.asked.worker or self.asked.cold or now - self._alive < HANGS / 4:
            return
        worker = self.processes[0]
        if is_serving(self.socket):
            self._alive = now
        elif worker.alive and now - self._alive > HANGS:
            print(f"worker has given no sign of life for {HANGS:.0f} s; it is started again", flush=True)
            self._alive = now
            stop([worker], grace=1)


def _address(server: str) -> str:
    """host:port, with the port that the server has unless it is told another."""
    host, colon, port = server.rpartition(":")
    if colon and port.isdecimal() and (":" not in host or host.startswith("[")):
        return server
    return f"[{server}]:{PORT}" if ":" in server and not server.startswith("[") else f"{server}:{PORT}"


def _context(asked: Asked) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=str(asked.credentials / "ca.crt")) if asked.credentials else False


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the socket, of its owner alone; its name is short, as a socket's path has at most 107 bytes."""
    base = tempfile.gettempdir()
    path = Path(tempfile.mkdtemp(prefix="fedlora-", dir=base if len(base) < 60 else "/tmp"))
    path.chmod(0o700)
    os.umask(0o077)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
