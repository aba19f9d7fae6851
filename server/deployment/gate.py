r"""The gateway for a server installed by pip alone: TLS, connections and time limits around the rules of `gate_rules`.

    python -m fedlora.server.deployment.gate --port 8443 --superlink 127.0.0.1:42000 \
        --ca ca.crt --cert server.crt --key server.key --clients keys/server

In containers nginx does this work (deploy/proxy). The process loads neither torch nor Flower, writes what it refused to
its log, a JSON object a line, and ends within 3 s of SIGTERM.
"""

import argparse
import asyncio
import json
import logging
import resource
import signal
import ssl
import sys
import time
from asyncio import Transport
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, cast

import h11
import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedlora.deployment.processes import listen
from fedlora.errors import ConfigError, FedloraError
from fedlora.server.deployment.gate_rules import CLOSE, Gateway, Limits, Peer, Refused, log, network
from fedlora.server.deployment.node_signatures import KnownClients, known_clients
from fedlora.storage.event_log import utc_timestamp


class Connection(H11Protocol):
    """A connection of uvicorn's that counts how many there are, and ends when nothing is sent or read for too long."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Count the connection, and end one where there are too many."""
        super().connection_made(transport)
        self._gateway = cast(Gateway, self.app)
        self._address = network(self.client[0] if self.client else "")
        self._peer = Peer(time.monotonic(), _certified(transport))
        if self.client:
            self._gateway.peers[self.client] = self._peer
        self._keep_to_limits()
        self._watch()

    def _keep_to_limits(self) -> None:
        """End a connection of a crowd that this one has made too large, of all or of the strangers at its address."""
        most, everybody = self._gateway.limits.connections, cast("set[Connection]", self.connections)
        strangers = [c for c in everybody if c._address == self._address and not c._peer.client]
        for crowd, limit in ((list(everybody), most), (strangers, most // 4)):
            if len(crowd) > limit:
                self._least_needed(crowd)._end(Refused(503, "too many connections"))

    def _least_needed(self, crowd: Sequence["Connection"]) -> "Connection":
        """The oldest of those on which no client has signed anything; else of the client that has most connections.

        Where clients have no keys all are alike, and this one, the newest, goes.
        """
        others = [c for c in crowd if c is not self and not c.transport.is_closing()]
        if self._gateway.clients is None or not others:
            return self
        held = Counter(c._peer.client for c in others)
        return max(others, key=lambda c: (not c._peer.client, held[c._peer.client], -c._peer.since))

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no longer."""
        super().connection_lost(exc)
        self._stop()
        if self.client:
            self._gateway.peers.pop(self.client, None)

    def data_received(self, data: bytes) -> None:
        """Take in bytes of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Wait, but not for ever, until the client has read what was sent."""
        super().pause_writing()
        self._stop()
        self._timer = self.loop.call_later(self._gateway.limits.patience, self._end, Refused(408, "slow reader"))

    def resume_writing(self) -> None:
        """Go on, as the client has read."""
        super().resume_writing()
        self._stop()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request. uvicorn's own method tells what was wrong, and fails once an answer has begun."""
        self._end(Refused(400, "malformed"), answer=self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE))

    def _watch(self) -> None:
        """Start the clock that runs until a request's headers are there, and again after its answer; else stop it."""
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.flow.write_paused:
                self._stop()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._gateway.limits.patience, self._silent)

    def _silent(self) -> None:
        """End a connection on which no request came in time."""
        if self.cycle is not None and not self.conn.trailing_data[0]:
            self.transport.close()  # the client was served, and asks no more
        else:
            self._end(Refused(408, "slow headers"))

    def _stop(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, no: Refused, answer: bool = False) -> None:
        """Close the connection, with an `answer` or at once."""
        self._gateway.refuse({"client": self.client}, no)
        if self.cycle is not None:
            self.cycle.disconnected = True  # the request that is being served has nobody to answer any more
            self.cycle.message_event.set()
        if not answer:
            self.transport.abort()
            return
        reply = h11.Response(status_code=no.status, headers=[(b"content-length", b"0"), CLOSE])
        self.transport.write((self.conn.send(reply) or b"") + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()


def _certified(transport: Transport) -> str | None:
    """The name in the client's certificate of a connection; none where the gateway asks for no certificate."""
    certificate = transport.get_extra_info("peercert")
    if not certificate:
        return None
    subject: dict[str, str] = {part[0][0]: part[0][1] for part in certificate["subject"]}
    return subject.get("commonName", "")


class Server(uvicorn.Server):
    """A server of uvicorn's that returns after SIGINT or SIGTERM; uvicorn's own sends itself the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End the serving, and nothing else, on either signal."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


def tls(options: argparse.Namespace) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The TLS settings towards clients, and towards the SuperLink. Raises `ConfigError` for a file of no use."""
    try:
        inside = ssl.create_default_context(cafile=options.ca)
        outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        outside.load_cert_chain(options.cert, options.key)
    except (OSError, TypeError) as e:
        files = f"--ca {options.ca}, --cert {options.cert}, --key {options.key}"
        raise ConfigError(f"{files}: {e}; give the three files that `fedlora provision` made, or --insecure") from e
    if options.clients and (authority := options.clients / "client-ca.crt").exists():
        outside.load_verify_locations(authority)
        outside.verify_mode = ssl.CERT_REQUIRED
    inside.minimum_version = outside.minimum_version = ssl.TLSVersion.TLSv1_2
    outside.options |= ssl.OP_NO_RENEGOTIATION
    return outside, inside


def _clients(folder: Path | None) -> KnownClients:
    """The clients that are let in. Raises `ConfigError` where nobody said which."""
    if folder is None:
        raise ConfigError("which clients are let in? give --clients, the server's folder of fedlora provision")
    return known_clients(folder)


class Lines(logging.Formatter):
    """Formats a record as one line of JSON, also one of uvicorn's or asyncio's."""

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)
        if record.name == log.name:
            return said
        return json.dumps({"event": "error", "at": utc_timestamp(record.created), "from": record.name, "said": said})


async def serve(options: argparse.Namespace, limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT, then at most a second longer. Raises `ConfigError` before the first request."""
    outside, inside = (None, None) if options.insecure else tls(options)
    clients = None if options.insecure else _clients(options.clients)
    listener = listen(options.host, options.port)
    async with _upstream(options.superlink, inside, limits) as upstream:
        gateway = Gateway(upstream, limits, clients)
        log.info(json.dumps({"event": "open", "at": utc_timestamp(time.time()), "port": listener.getsockname()[1]}))
        await Server(_uvicorn_config(gateway, outside)).serve(sockets=[listener])
        await asyncio.sleep(0.1)  # in which clients whose request was cut off hear that they may come again
        log.info(json.dumps({"event": "closed", "at": utc_timestamp(time.time()), **vars(gateway.counts)}))


def _upstream(superlink: str, inside: ssl.SSLContext | None, limits: Limits) -> httpx.AsyncClient:
    """An HTTP client of the SuperLink."""
    upstream = httpx.AsyncClient(
        base_url=f"{'https' if inside else 'http'}://{superlink}",
        verify=inside or False,
        limits=httpx.Limits(max_connections=limits.concurrent, max_keepalive_connections=limits.per_client),
        timeout=httpx.Timeout(60.0, connect=5.0),
        trust_env=False,
    )
    upstream.headers = httpx.Headers({"accept-encoding": "identity"})
    return upstream


def _uvicorn_config(gateway: Gateway, outside: ssl.SSLContext | None) -> uvicorn.Config:
    settings: dict[str, Any] = {
        **{"http": Connection, "loop": "asyncio", "ws": "none", "lifespan": "off", "interface": "asgi3"},
        **{"log_config": None, "log_level": "error", "access_log": False},
        **{"server_header": False, "proxy_headers": False, "timeout_graceful_shutdown": 1},
        "h11_max_incomplete_event_size": gateway.limits.head,
        "timeout_keep_alive": round(gateway.limits.patience),
    }
    if outside is not None:
        settings["ssl_context_factory"] = lambda config, default: outside
    return uvicorn.Config(gateway, **settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fedlora.server.deployment.gate`; returns the exit code."""
    options = _parser().parse_args(arguments)
    _log_to(options.log)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # half-open connections must not use up the others' files
    limits = Limits(**{limit.name: getattr(options, f"limit_{limit.name}") for limit in fields(Limits)})
    try:
        asyncio.run(serve(options, limits))
    except FedloraError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedlora.server.deployment.gate", description="The gateway between clients and SuperLink."
    )
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument("--superlink", default="127.0.0.1:42000", metavar="HOST:PORT")
    for name in ("ca", "cert", "key", "log"):
        parser.add_argument(f"--{name}", metavar="FILE")
    parser.add_argument("--clients", type=Path, metavar="FOLDER", help="the server's folder of fedlora provision")
    parser.add_argument("--insecure", action="store_true", help="plain HTTP on both sides, and SuperNodes without keys")
    for limit in fields(Limits):
        parser.add_argument(f"--limit-{limit.name.replace('_', '-')}", type=type(limit.default), default=limit.default)
    return parser


def _is_news(record: logging.LogRecord) -> bool:
    """Is this more than that connections were open, and waiting, when the gateway was ended?"""
    return not str(record.msg).startswith("Cancel %s running task")


def _log_to(file: str | None) -> None:
    """Write JSON lines to the file, a new one after 10 MB, or to stderr."""
    handler: logging.Handler = logging.StreamHandler()
    if file:
        handler = RotatingFileHandler(Path(file), maxBytes=10 << 20, backupCount=5)
    handler.setFormatter(Lines())
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
