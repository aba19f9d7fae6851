"""The process in front of the SuperLink: TLS, connections and their time limits around the rules of `gate_rules`.

    python -m fedlora.server.deployment.gate --port 8443 --superlink 127.0.0.1:42000 \
        --ca ca.crt --cert server.crt --key server.key

It knows neither torch nor Flower, says on its log (JSON lines) what it refused, and ends within 3 s of SIGTERM.
"""

import argparse
import asyncio
import json
import logging
import resource
import signal
import socket
import ssl
import sys
import time
from asyncio import Transport
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

from fedlora.errors import ConfigError, FedloraError
from fedlora.server.deployment.gate_rules import CLOSE, Door, Limits, Refused, log, network
from fedlora.storage.event_log import utc_timestamp


class Connection(H11Protocol):
    """uvicorn's connection, with what it lacks: a number of them, and an end to those that say or hear nothing."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._door = cast(Door, self.app)
        self._address = network(self.client[0] if self.client else "")
        self._door.connected[self._address] += 1
        most = self._door.limits.connections
        if len(self.connections) > most or self._door.connected[self._address] > most // 4:
            self._end(Refused(503, "too many connections"))
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()
        self._door.connected[self._address] -= 1
        self._door.connected = +self._door.connected

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop()
        self._timer = self.loop.call_later(self._door.limits.patience, self._end, Refused(408, "slow reader"))

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """In place of uvicorn's, which says what it did not understand, and fails once an answer has begun."""
        self._end(Refused(400, "malformed"), answer=self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE))

    def _watch(self) -> None:
        """A clock runs from the first moment until a request's headers are there, and again after its answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.flow.write_paused:
                self._stop()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._door.limits.patience, self._silent)

    def _silent(self) -> None:
        if self.cycle is not None and not self.conn.trailing_data[0]:
            self.transport.close()  # it was served, and has nothing more to ask
        else:
            self._end(Refused(408, "slow headers"))

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, no: Refused, answer: bool = False) -> None:
        self._door.refuse({"client": self.client}, no)
        if self.cycle is not None:
            self.cycle.disconnected = True  # a request that is in there has nobody to answer any more
            self.cycle.message_event.set()
        if not answer:
            self.transport.abort()
            return
        reply = h11.Response(status_code=no.status, headers=[(b"content-length", b"0"), CLOSE])
        self.transport.write((self.conn.send(reply) or b"") + (self.conn.send(h11.EndOfMessage()) or b""))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which would end its process by the signal that it got."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
        yield


def tls(options: argparse.Namespace) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Towards clients, and towards the SuperLink. Raises ConfigError for a file that cannot be used."""
    try:
        inside = ssl.create_default_context(cafile=options.ca)
        outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        outside.load_cert_chain(options.cert, options.key)
    except (OSError, TypeError) as e:
        files = f"--ca {options.ca}, --cert {options.cert}, --key {options.key}"
        raise ConfigError(f"{files}: {e}; give the three files that `fedlora provision` made, or --insecure") from e
    inside.minimum_version = outside.minimum_version = ssl.TLSVersion.TLSv1_2
    outside.options |= ssl.OP_NO_RENEGOTIATION
    return outside, inside


class Lines(logging.Formatter):
    """One JSON object a line, also of what uvicorn or asyncio has to say."""

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record)
        if record.name == log.name:
            return said
        return json.dumps({"event": "error", "at": utc_timestamp(record.created), "from": record.name, "said": said})


async def serve(options: argparse.Namespace, limits: Limits) -> None:
    """Listen until SIGTERM or SIGINT, then at most a second longer. Raises ConfigError before that."""
    outside, inside = (None, None) if options.insecure else tls(options)
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family, backlog=256)
    except OSError as e:
        raise ConfigError(f"cannot listen on {options.host} port {options.port}: {e}; choose another --port") from e
    base = f"{'https' if inside else 'http'}://{options.superlink}"
    pool = httpx.Limits(max_connections=limits.concurrent, max_keepalive_connections=limits.per_client)
    waits = httpx.Timeout(60.0, connect=5.0)
    async with httpx.AsyncClient(
        base_url=base, verify=inside or False, limits=pool, timeout=waits, trust_env=False
    ) as upstream:
        upstream.headers = httpx.Headers({"accept-encoding": "identity"})
        door = Door(upstream, limits, keyless=options.insecure)
        settings: dict[str, Any] = {
            **{"http": Connection, "loop": "asyncio", "ws": "none", "lifespan": "off", "interface": "asgi3"},
            **{"log_config": None, "log_level": "error", "access_log": False, "server_header": False},
            **{"proxy_headers": False, "h11_max_incomplete_event_size": limits.head, "timeout_graceful_shutdown": 1},
            "timeout_keep_alive": round(limits.patience),
        }
        if outside is not None:
            settings["ssl_context_factory"] = lambda config, default: outside
        log.info(json.dumps({"event": "open", "at": utc_timestamp(time.time()), "port": listener.getsockname()[1]}))
        await Server(uvicorn.Config(door, **settings)).serve(sockets=[listener])
        await asyncio.sleep(0.1)  # for those who were in the middle of a request, to hear that they may come again
        log.info(json.dumps({"event": "closed", "at": utc_timestamp(time.time()), **vars(door.counts)}))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m fedlora.server.deployment.gate`."""
    parser = argparse.ArgumentParser(
        prog="fedlora.server.deployment.gate", description="The door between clients and SuperLink."
    )
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8443)
    parser.add_argument("--superlink", default="127.0.0.1:42000", metavar="HOST:PORT")
    for name in ("ca", "cert", "key", "log"):
        parser.add_argument(f"--{name}", metavar="FILE")
    parser.add_argument("--insecure", action="store_true", help="plain HTTP on both sides, and SuperNodes without keys")
    for limit in fields(Limits):
        parser.add_argument(f"--limit-{limit.name.replace('_', '-')}", type=type(limit.default), default=limit.default)
    options = parser.parse_args(arguments)
    file = RotatingFileHandler(Path(options.log), maxBytes=10 << 20, backupCount=5) if options.log else None
    handler = file or logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # half-open connections must not use up the others' files
    try:
        limits = Limits(**{f.name: getattr(options, f"limit_{f.name}") for f in fields(Limits)})
        asyncio.run(serve(options, limits))
    except FedloraError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
