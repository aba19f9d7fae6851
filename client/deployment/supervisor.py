"""`fedlora client`: a SuperNode, its SuperExec and a warm worker, watched and started again as long as it is wanted.

    server ◀─TLS─ SuperNode ◀─ SuperExec ──▶ ClientApp, a new one a message ──Unix socket──▶ worker (model, data, state)

The SuperNode only dials out. Each message's ClientApp is a stub; the worker alone holds the data, and nothing but the
typed messages of worker.proto reaches it.
"""

import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx

from fedlora.client.deployment.health import is_serving
from fedlora.deployment.processes import Process, Tail, exclusive, flwr_home, free_port, program, scratch_folder, stop
from fedlora.deployment.provision import read_client
from fedlora.deployment.supervisor import Restart, Supervisor, restart_later
from fedlora.errors import ConfigError

CLOCK = 5.0  # seconds that this machine's clock may be behind the server's, for Flower's signatures
AHEAD = 300.0  # and ahead of it
HANGS = 300.0  # seconds without a sign of life after which a worker is started again
REFUSED = ("2004", "2001")  # what Flower says of a key: it is not known, or in use
GIVES_UP = "SSL/TLS handshake error detected"  # and Flower's SuperNode then hangs, for ever
SOCKET = "worker.sock"
PORT = 8443
MISTAKE = 2  # exit code of a worker whose settings or data are wrong


@dataclass(frozen=True)
class ClientOptions:
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


def asked(
    server: str, credentials: Path | None, state: Path, id: int | None, settings: Mapping[str, Any]
) -> ClientOptions:
    """What was asked for, checked. Raises `ConfigError` for what does not go together."""
    if credentials:
        who = read_client(credentials)
        if id not in (None, who.id):
            raise ConfigError(f"--id {id}: the keys in {credentials} are those of {who.name}, number {who.id}")
        address = server or who.server
        return ClientOptions(_address(address), credentials, state, who.id, who.name, settings)
    if id is None:
        raise ConfigError("without keys a client needs a number of its own: --id 0")
    return ClientOptions(_address(server), None, state, id, f"client {id}", settings)


def serve(asked: ClientOptions) -> None:
    """Take part until SIGTERM or Ctrl-C."""
    with exclusive(asked.state), scratch_folder(len(SOCKET)) as scratch:
        os.umask(0o077)
        if not asked.credentials:
            print("INSECURE: no TLS, no key: anyone on the way can read and change what is sent. For trials only.")
        ClientProcesses(asked, asked.worker or scratch / SOCKET, scratch).run()


def reachable(asked: ClientOptions, meanwhile: Callable[[], None]) -> None:
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


def told(asked: ClientOptions) -> str:
    """Who the client is and what is its own, for its worker."""
    return json.dumps({"id": asked.id, "state": str(asked.state.absolute()), "settings": dict(asked.settings)})


def worker_command(asked: ClientOptions, socket: Path) -> list[str]:
    """The command line of the worker that belongs to this client."""
    return [sys.executable, "-m", "fedlora", "worker", "--socket", str(socket), "--told", told(asked)]


class ClientProcesses:
    """SuperNode, SuperExec and worker of one client, watched until the command is ended."""

    def __init__(self, asked: ClientOptions, socket: Path, scratch: Path) -> None:
        self._asked, self._socket, self._scratch = asked, socket, scratch
        self._logs = asked.state / "logs"
        secret, port = scratch / "superexec.secret", free_port()
        secret.write_text(token_hex(32))
        self._node = Process(
            "SuperNode", self._node_command(port, secret), self._log("supernode"), flwr_home(asked.state)
        )
        command = [program("flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        command += ["--superexec-auth-secret-file", str(secret)]
        self._superexec = Process("SuperExec", command, self._log("superexec"))
        self._worker: Process | None = None  # none: it is started elsewhere, or each message loads the model
        if not (asked.worker or asked.cold):
            self._worker = Process("worker", worker_command(asked, socket), self._log("worker"))
        self._worker_seen = 0.0  # when the worker last gave a sign of life

    def run(self) -> None:
        """Start the processes, the worker first: it says at once what is wrong with the data. Then watch over them."""
        screen, node_log = Tail(self._logs / "screen.log"), Tail(self._log("supernode"))
        with Supervisor(self._restart) as supervisor:
            if self._worker:
                supervisor.start(self._worker)
            reachable(self._asked, supervisor.look)
            supervisor.start(self._node)
            supervisor.start(self._superexec)
            self._worker_seen = time.monotonic()
            print(f"{self._asked.name} takes part at {self._asked.server}; logs in {self._logs}", flush=True)
            while True:
                time.sleep(0.3)
                screen.show()
                if GIVES_UP in node_log.new():
                    print("SuperNode gave up on a connection that broke off; it is started again", flush=True)
                    stop([self._node], grace=5)
                supervisor.look()
                self._look_at_worker()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _node_command(self, port: int, secret: Path) -> list[str]:
        asked = self._asked
        config = f"partition-id={asked.id} worker='{self._socket}'"
        if asked.cold:
            (self._scratch / "told.json").write_text(told(asked))
            config = f"partition-id={asked.id} cold='{self._scratch / 'told.json'}'"
        command = [program("flower-supernode"), "--superlink", asked.server, "--isolation", "process"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", config]
        command += ["--superexec-auth-secret-file", str(secret)]
        if folder := asked.credentials:
            command += ["--root-certificates", str(folder / "ca.crt")]
            command += ["--auth-supernode-private-key", str(folder / "client.key")]
        else:
            command += ["--insecure"]
        return command

    def _restart(self, process: Process) -> Restart:
        """Raises `ConfigError` for a worker that its settings or its data ended: to start it again is of no use."""
        if process is self._worker and process.code == MISTAKE:
            raise ConfigError(process.log_tail(1).removeprefix("error: "))
        words = process.log_tail(15)
        if process is self._node and any(f"code: {code}]" in words for code in REFUSED):
            why = (
                "the server does not take this key: it was here less than a minute ago, or is not registered, or this "
                "machine's clock is wrong"
            )
            return Restart(why, pause=10.0)  # the SuperLink takes no key that it believes to be online still
        return restart_later(process)

    def _look_at_worker(self) -> None:
        """End a worker that hangs; the supervisor starts it again."""
        if self._worker is None:
            return
        now, seen = time.monotonic(), max(self._worker_seen, self._worker.started)
        if now - seen < HANGS / 4:
            return
        if is_serving(self._socket):
            self._worker_seen = now
        elif self._worker.alive and now - seen > HANGS:
            print(f"worker has given no sign of life for {HANGS:.0f} s; it is started again", flush=True)
            self._worker_seen = now
            stop([self._worker], grace=1)


def _address(server: str) -> str:
    """host:port, with the port that the server has unless it is told another."""
    host, colon, port = server.rpartition(":")
    if colon and port.isdecimal() and (":" not in host or host.startswith("[")):
        return server
    return f"[{server}]:{PORT}" if ":" in server and not server.startswith("[") else f"{server}:{PORT}"


def _context(asked: ClientOptions) -> ssl.SSLContext | bool:
    return ssl.create_default_context(cafile=str(asked.credentials / "ca.crt")) if asked.credentials else False
