"""The two gateways of a SuperLink, started as processes, and a server behind them that records what reached it."""

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fedlora.deployment.provision import key_header, provision
from fedlora.server.deployment.gate_rules import CALLS
from fedlora.server.deployment.node_signatures import KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER

ROOT = Path(__file__).parents[2]
FILES = {"ca": "ca.crt", "cert": "server.crt", "key": "server.key"}
OPEN = {*(("POST", f"/v1/fleet/{call}") for call in CALLS), ("GET", "/health"), ("HEAD", "/health")}
PULL = "POST /v1/fleet/pull-messages HTTP/1.1"
LARGE = os.urandom(5 << 20)
PATIENCE = 3.0  # seconds


@dataclass
class SuperLink:
    """The other side: it answers everything, and remembers it."""

    certificates: Path
    port: int
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        got = (scope["method"], scope["raw_path"].decode(), dict(request.headers), await request.body())
        self.seen.append(got)
        if scope["path"].endswith("pull-object"):
            await StreamingResponse(iter([LARGE[i : i + 65536] for i in range(0, len(LARGE), 65536)]))(
                scope, receive, send
            )
        else:
            told = {"flwr-version-incompatibility-message": "none", "connection": "close"}
            await Response(b"", 401 if got[3] == b"unknown" else 200, told)(scope, receive, send)

    def start(self) -> None:
        files = {"ssl_certfile": self.certificates / "server.crt", "ssl_keyfile": self.certificates / "server.key"}
        config = uvicorn.Config(self, port=self.port, log_level="critical", lifespan="off", ws="none", **files)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait(self.port)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@dataclass
class Gate:
    """A gateway that is running: its address, and its log."""

    port: int
    certificates: Path
    log: Path
    process: subprocess.Popen[bytes]

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """A connection from this address."""
        context = ssl.create_default_context(cafile=self.certificates / "ca.crt")
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(source, 0))
        return context.wrap_socket(plain, server_hostname="localhost")

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


class PlainGate(Gate):
    """The same without TLS."""

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(source, 0))


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def wait(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nobody listens on {port}")


def head(line: str, headers: Mapping[str, object]) -> bytes:
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin1")


def answer(conn: socket.socket) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body; a connection that was closed without an answer has status 0."""
    response = http.client.HTTPResponse(conn)
    try:
        response.begin()
        return response.status, response.headers, response.read()
    except (http.client.BadStatusLine, ConnectionError, ssl.SSLError):
        return 0, {}, b""


def signed(certificates: Path, client: str = "site", at: datetime | None = None) -> dict[str, object]:
    """The headers by which a SuperNode with this client's key signs a request."""
    time_, key = (at or datetime.now(UTC)).isoformat(), private_key(certificates.parent / "clients" / client)
    signature = key.sign(time_.encode(), ec.ECDSA(hashes.SHA256()))
    public = key_header(key.public_key()).decode()
    return {KEY_HEADER: public, SIGNATURE_HEADER: b64encode(signature).decode(), TIME_HEADER: time_}


def private_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    key = load_ssh_private_key((folder / "client.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def ask(
    gate: Gate, line: str = PULL, body: bytes = b"", client: str = "site", **more: object
) -> tuple[int, Mapping[str, str], bytes]:
    """The answer to a request that this client has signed; with an empty name, to a stranger's."""
    fixed = {"Host": "localhost", "Content-Length": len(body), "Connection": "close"}
    whose = signed(gate.certificates, client) if client else {}
    with gate.connect() as conn:
        conn.sendall(head(line, fixed | whose | {name.replace("_", "-"): value for name, value in more.items()}) + body)
        return answer(conn)


def start_gate(superlink: SuperLink, folder: Path, *options: str) -> Gate:
    files = [f"--{name}={superlink.certificates / file}" for name, file in FILES.items()]
    port, log = free(), folder / "log"
    where = ["--host=127.0.0.1", f"--port={port}", f"--superlink=127.0.0.1:{superlink.port}", f"--log={log}"]
    where += [f"--clients={superlink.certificates}"]
    process = subprocess.Popen([sys.executable, "-m", "fedlora.server.deployment.gate", *where, *files, *options])
    return Gate(port, superlink.certificates, log, process)


def start_nginx(superlink: SuperLink, folder: Path) -> Gate:
    """The file that the container has, with this machine's places and ports."""
    if not shutil.which("nginx"):
        pytest.skip("no nginx here: apt-get install nginx-light")
    port, text = free(), (ROOT / "deploy" / "proxy" / "nginx.conf").read_text()
    for old, new in {
        "/tmp/": f"{folder}/",
        "proxy_ssl_name superlink": "proxy_ssl_name localhost",
        "listen 8443": f"listen 127.0.0.1:{port}",
        "127.0.0.1:8080": f"127.0.0.1:{free()}",
        "/credentials": str(superlink.certificates),
        "/dev/stdout": f"{folder}/log",
        "timeout 30s": f"timeout {PATIENCE:.0f}s",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(("user root;\n" if os.geteuid() == 0 else "") + text)
    command = ["sh", ROOT / "deploy" / "proxy" / "start.sh", "-p", folder, "-c", folder / "nginx.conf"]
    here = {"TMPDIR": str(folder), "SUPERLINK": f"127.0.0.1:{superlink.port}"}
    here |= {"CREDENTIALS": str(superlink.certificates)}
    process = subprocess.Popen(command, env=os.environ | here)
    return Gate(port, superlink.certificates, folder / "log", process)


@pytest.fixture(scope="session")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    folder = tmp_path_factory.mktemp("ca")
    provision(folder, ["localhost"], ["site", "other"])
    made = SuperLink(folder / "server", free())
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="session", params=[start_gate, start_nginx], ids=["gate", "nginx"])
def shared(
    request: pytest.FixtureRequest, superlink: SuperLink, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gate]:
    options = [f"--limit-patience={PATIENCE}"] if request.param is start_gate else []
    made = request.param(superlink, tmp_path_factory.mktemp("gate"), *options)
    wait(made.port)
    yield made
    made.process.terminate()
    made.process.wait(10)


@pytest.fixture
def gate(shared: Gate, superlink: SuperLink) -> Iterator[Gate]:
    """After every test: nothing but the open calls has reached the other side."""
    superlink.seen.clear()
    yield shared
    assert {(method, path) for method, path, _, _ in superlink.seen} <= OPEN


@pytest.fixture
def own(superlink: SuperLink, tmp_path: Path) -> Iterator[Callable[..., Gate]]:
    """A gate with limits of its own."""
    with ExitStack() as stack:

        def start(*options: str) -> Gate:
            made = start_gate(superlink, tmp_path, *options)
            stack.callback(made.process.wait, 10)
            stack.callback(made.process.kill)
            wait(made.port)
            superlink.seen.clear()
            return made

        yield start


@pytest.fixture
def keyless(superlink: SuperLink, tmp_path: Path) -> Iterator[Gate]:
    """A gate for a trial, without TLS and keys."""
    port = free()
    where = ["--host=127.0.0.1", f"--port={port}", f"--superlink=127.0.0.1:{superlink.port}"]
    command = [sys.executable, "-m", "fedlora.server.deployment.gate", "--insecure", *where]
    process = subprocess.Popen([*command, f"--log={tmp_path / 'log'}"])
    wait(port)
    yield PlainGate(port, superlink.certificates, tmp_path / "log", process)
    process.kill()
    process.wait(10)
