"""`fedlora client`: a SuperNode, its SuperExec and a warm worker, started again when they end, until Ctrl-C.

    server ◀─TLS─ SuperNode ◀─ SuperExec ──▶ ClientApp, a new one a message ──Unix socket──▶ worker (model, data, state)

The SuperNode only dials out. Each message's ClientApp is a stub; the worker alone holds the data, and nothing but the
typed messages of worker.proto reaches it.
"""

import json
import os
import re
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

from fedlora.client.deployment.connection import ServerConnection
from fedlora.client.deployment.health import is_serving
from fedlora.deployment.addresses import server_address
from fedlora.deployment.processes import Process, Tail, exclusive, flwr_home, free_port, program, scratch_folder, stop
from fedlora.deployment.provision import has_certificate, read_client
from fedlora.deployment.supervisor import Restart, Supervisor, restart_later
from fedlora.environment import no_proxy
from fedlora.errors import ConfigError
from fedlora.storage.files import write_durably

BEHIND = 5.0  # seconds that this machine's clock may be behind the server's, for Flower's signatures
AHEAD = 300.0  # seconds that it may be ahead
HANGS = 300.0  # seconds without a sign of life after which a worker is started again
SOCKET = "worker.sock"
MISTAKE = 2  # exit code of a worker whose settings or data are wrong
STALLED = 3  # exit code of a worker whose job stood still


@dataclass(frozen=True)
class ClientOptions:
    """What the command line of `fedlora client` asks for."""

    server: str  # HOST:PORT
    credentials: Path | None  # this client's folder of `fedlora provision`; none: no TLS and no key
    state: Path  # the folder of all that the client keeps
    id: int
    name: str
    settings: Mapping[str, Any]  # the client's own, by their dotted keys
    worker: Path | None = None  # the socket of a worker that is started elsewhere; none: start one here
    cold: bool = False  # start no worker: each message loads the model, which takes no memory between messages

    @property
    def url(self) -> str:
        """The server's address with its scheme."""
        return f"{'https' if self.credentials else 'http'}://{self.server}"


def client_options(
    server: str, credentials: Path | None, state: Path, id: int | None, settings: Mapping[str, Any]
) -> ClientOptions:
    """The options of a client, by its folder of credentials if there is one, else by its number.

    Raises `ConfigError` for options that do not go together.
    """
    if credentials:
        who = read_client(credentials)
        if id not in (None, who.id):
            raise ConfigError(f"--id {id}: the keys in {credentials} are those of {who.name}, number {who.id}")
        address = server or who.server
        return ClientOptions(server_address(address), credentials, state, who.id, who.name, settings)
    if id is None:
        raise ConfigError("without keys a client needs a number of its own: --id 0")
    return ClientOptions(server_address(server), None, state, id, f"client {id}", settings)


def serve(options: ClientOptions) -> None:
    """Take part in the server's runs until SIGTERM or Ctrl-C."""
    with exclusive(options.state), scratch_folder(len(SOCKET)) as scratch:
        os.umask(0o077)
        os.environ.update(no_proxy() | flwr_home(options.state))
        if not options.credentials:
            print("INSECURE: no TLS, no key: anyone on the way can read and change what is sent. For trials only.")
        ClientProcesses(options, options.worker or scratch / SOCKET, scratch).run()


def wait_for_server(options: ClientOptions, meanwhile: Callable[[], None]) -> None:
    """Wait until the server answers, print why it does not, and call `meanwhile` a few times a second.

    Raises `ConfigError` for a certificate that the client cannot trust, which waiting does not mend.
    """
    pause, verify, began, told = 1.0, tls_context(options), time.monotonic(), 0.0
    while True:
        try:
            answer = httpx.get(f"{options.url}/health", verify=verify, timeout=10)  # by the site's proxy, as Flower
            break
        except httpx.HTTPError as e:
            raise_if_untrusted(options, e)
            silent = time.monotonic() - began
            if silent >= told:  # ever rarer
                told = 2 * silent
                print(f"{options.server} does not answer ({why_silent(e)}); trying again until it does", flush=True)
        end = time.monotonic() + pause
        while time.monotonic() < end:
            meanwhile()
            time.sleep(0.3)
        pause = min(2 * pause, 30.0)
    if wrong := wrong_clock(answer.headers.get("date")):
        print(f"WARNING: {wrong}", flush=True)


def why_silent(error: httpx.HTTPError) -> str:
    """Why a server does not answer, in a few words."""
    if isinstance(error, httpx.ProxyError):
        return f"the proxy that the environment names, in https_proxy or all_proxy, says: {error}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def raise_if_untrusted(options: ClientOptions, error: httpx.HTTPError) -> None:
    """Raise `ConfigError` where a server does not answer because its certificate, or the client's, is not taken."""
    if "CERTIFICATE_REQUIRED" in str(error):
        raise ConfigError(
            f"{options.server} asks for a client's certificate, and {options.credentials} has no tls.crt; ask whoever "
            "provisions for the folder that `fedlora provision --client-certificates` made"
        ) from error
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise ConfigError(
            f"{options.server} has a certificate that {options.credentials}/ca.crt does not vouch for, or not for "
            f"this name ({_said_of_certificate(error)}); ask whoever runs the server for the right ca.crt and host"
        ) from error


def _said_of_certificate(error: Exception) -> str:
    """What OpenSSL says of a certificate, without its own names and the place in its code."""
    return re.sub(r".*certificate verify failed:?\s*|\s*\(_ssl\.c:\d+\)", "", str(error))


def wrong_clock(date: str | None) -> str:
    """How this machine's clock differs from the server's, if by more than Flower's signatures allow; empty if not."""
    if not date:
        return ""
    ahead = time.time() - parsedate_to_datetime(date).timestamp()
    if -BEHIND - 1 <= ahead <= AHEAD:
        return ""
    return (
        f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's, and its "
        "signature is not taken; set the clock (NTP)"
    )


def write_identity(options: ClientOptions, file: Path) -> None:
    """Write the client's number, folder and own settings as JSON, for its worker, in a file that its owner alone reads.

    The command line of a process can be read by everyone on the machine.
    """
    identity = {"id": options.id, "state": str(options.state.absolute()), "settings": dict(options.settings)}
    write_durably(file, json.dumps(identity).encode(), mode=0o600)


def worker_command(socket: Path, identity: Path) -> list[str]:
    """The command line of the worker of the client whose identity is in this file."""
    return [sys.executable, "-m", "fedlora", "worker", "--socket", str(socket), "--told", str(identity)]


class ClientProcesses:
    """SuperNode, SuperExec and worker of one client."""

    def __init__(self, options: ClientOptions, socket: Path, scratch: Path) -> None:
        """`socket` is the worker's; `scratch` a folder for what is needed as long as the command runs."""
        self._options, self._socket, self._identity = options, socket, scratch / "identity.json"
        self._connection = ServerConnection(options.name, options.server)
        self._logs = options.state / "logs"
        secret, port = scratch / "superexec.secret", free_port()
        secret.write_text(token_hex(32))
        write_identity(options, self._identity)
        self._node = Process("SuperNode", self._node_command(port, secret), self._log("supernode"))
        command = [program("flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        command += ["--superexec-auth-secret-file", str(secret)]
        self._superexec = Process("SuperExec", command, self._log("superexec"))
        self._worker: Process | None = None  # none: it is started elsewhere, or each message loads the model
        if not options.worker and not options.cold:
            self._worker = Process("worker", worker_command(socket, self._identity), self._log("worker"))
        self._worker_seen = 0.0  # when the worker last gave a sign of life

    def run(self) -> None:
        """Start the processes and watch over them until an exception ends this.

        The worker is first, as it says at once what is wrong with the data.
        """
        screen, node_log = Tail(self._logs / "screen.log"), Tail(self._log("supernode"))
        with Supervisor(self._restart) as supervisor:
            if self._worker:
                supervisor.start(self._worker)
            wait_for_server(self._options, supervisor.look)
            supervisor.start(self._node)
            supervisor.start(self._superexec)
            self._worker_seen = time.monotonic()
            print(f"{self._options.name} dials {self._options.server}; logs in {self._logs}", flush=True)
            while True:
                time.sleep(0.3)
                self._connection.answered(screen.show())
                self._follow(node_log.new())
                self._end_hanging_worker()
                supervisor.look()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _node_command(self, port: int, secret: Path) -> list[str]:
        options = self._options
        config = f"partition-id={options.id} worker='{self._socket}'"
        if options.cold:
            config = f"partition-id={options.id} cold='{self._identity}'"
        command = [*self._node_program(), "--superlink", options.server, "--isolation", "process"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", config]
        command += ["--superexec-auth-secret-file", str(secret)]
        if folder := options.credentials:
            command += ["--root-certificates", str(folder / "ca.crt")]
            command += ["--auth-supernode-private-key", str(folder / "client.key")]
        else:
            command += ["--insecure"]
        return command

    def _node_program(self) -> list[str]:
        """Flower's SuperNode; where the client has a certificate for its connections, the one that presents it."""
        folder = self._options.credentials
        if folder and has_certificate(folder):
            return [sys.executable, "-m", "fedlora.client.deployment.supernode", str(folder)]
        return [program("flower-supernode")]

    def _restart(self, process: Process) -> Restart:
        """Why a process ended, and when it is started again.

        Raises `ConfigError` for a worker that ended because of its settings or data: to start it again is of no use.
        """
        if process is self._worker and process.code == MISTAKE:
            raise ConfigError(process.log_tail(1).removeprefix("error: "))
        if process is self._worker and process.code == STALLED:
            return Restart("its job stood still for as long as client.stall allows", process.pause())
        return self._connection.ended(process) if process is self._node else restart_later(process)

    def _follow(self, lines: str) -> None:
        """Say what new lines of the SuperNode mean; end one that has given up, which hangs: it is started again."""
        for words in self._connection.news(lines):
            print(words, flush=True)
        if self._connection.gave_up:
            stop([self._node], grace=5)

    def _end_hanging_worker(self) -> None:
        """End a worker that gives no sign of life; the supervisor starts it again."""
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


def tls_context(options: ClientOptions) -> ssl.SSLContext | bool:
    """The TLS settings that trust the deployment's authority alone; false without credentials.

    They present the client's own certificate, if it has one.
    """
    if not options.credentials:
        return False
    context = ssl.create_default_context(cafile=str(options.credentials / "ca.crt"))
    if has_certificate(options.credentials):
        context.load_cert_chain(options.credentials / "tls.crt", options.credentials / "tls.key")
    return context
