"""What a SuperNode may say to the SuperLink through the gateway, and how much of it: ten calls, no more.

Flower's SuperLink has its Fleet, Control and Runtime APIs on one port, and the Control API asks nobody who they are:
whoever reaches it runs code on every client. So the SuperLink listens on its own machine alone, behind this gateway:

    client --TLS--> gateway --one of ten paths, a whole body, eight headers by name--> SuperLink on 127.0.0.1

The path that is sent on is a constant of this file, never the text that came. A request gets a place only after its key
was found among the deployment's clients and its signature was verified: a stranger is answered 401 before a byte of its
body is read, and /health, which anybody may ask, has a few places of its own. A body is read and counted to its end
first: what is too big, too slow or broken off never reaches the SuperLink, which has one process and no limit. The
answer to a client when all is busy is 503, not 429: a SuperNode tries again after 502, 503 and 504 alone, and gives up
its work after any other. deploy/proxy/nginx.conf has the same rules as far as nginx can have them, and
tests/server/deployment/test_gate.py holds both to them.
"""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import IPv6Address
from math import inf

import httpx
from starlette.types import Message, Receive, Scope, Send

from fedlora.deployment.provision import key_fingerprint
from fedlora.server.deployment.node_signatures import (
    KEY_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    KnownClients,
    NotSigned,
)
from fedlora.storage.event_log import utc_timestamp

CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab"),
    *("pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received"),
)
# Only a SuperNode without a key calls these. A SuperLink that wants keys refuses both: the server registers the keys.
KEYLESS_CALLS = ("register-node", "unregister-node")
HEADERS = frozenset(  # that are sent on; all others, such as X-Forwarded-* and the Runtime's task tokens, are dropped
    {
        *("content-type", "accept", KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER),
        *("flwr-package-name", "flwr-package-version", "flwr-component-name"),
    }
)
HEALTH = "/health"
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "upgrade", "trailer", "server", "date"})
CLOSE = (b"connection", b"close")

log = logging.getLogger("fedlora.gate")


@dataclass(frozen=True)
class Limits:
    """The most that one client, all strangers and all together may use.

    A client is a known key that signed the request. Without keys (`--insecure`) it is an address and a claimed key.
    """

    body: int = 8 << 20  # bytes of a request's body; Flower's chunks are 5 MB
    concurrent: int = 64  # requests at once, of all clients
    per_client: int = 8  # requests at once
    kept: int = 2  # places that are each known client's own, however busy the others are
    strangers: int = 8  # requests at once, of all that need no key where clients have keys
    per_address: int = 32  # requests at once, where clients have no keys
    uploads: int = 1 << 30  # bytes a minute of a client; of an address, where clients have no keys, four times as many
    patience: float = 30.0  # seconds without a byte
    slowest: int = 4 << 10  # bytes a second that a body must come in with on average ...
    grace: float = 10.0  # ... from so many seconds on
    slow: int = 8  # bodies that may be cut off for that in a minute before the client has to wait for the next minute
    whole: float = 180.0  # seconds for a body; after that the SuperLink has forgotten the upload
    connections: int = 256  # that are open, busy or not; of the strangers at one address a quarter as many
    head: int = 16 << 10  # bytes of a request's line and headers


@dataclass
class Counts:
    """What went through the gateway since its start."""

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass(frozen=True)
class Share:
    """A name under which a request is counted, and the most that may be used under it."""

    name: str
    at_once: int  # requests
    a_minute: float = inf  # bytes of bodies


@dataclass
class Peer:
    """The other end of a connection."""

    since: float  # by time.monotonic()
    certified: str | None  # the name in its certificate; none where no certificate is asked for
    client: str = ""  # whose key has signed a request on this connection; empty for a stranger


class Refused(Exception):
    """A request goes no further."""

    def __init__(self, status: int, reason: str, retry: int = 0, key: str = "") -> None:
        """Answer with `status`; log the `reason` and the fingerprint of the `key`, if it is about one.

        With `retry`, say after how many seconds to try again.
        """
        self.status, self.reason, self.retry, self.key = status, reason, retry, key


class Gateway:
    """The rules, as an ASGI application in front of `upstream`."""

    def __init__(
        self, upstream: httpx.AsyncClient, limits: Limits | None = None, clients: KnownClients | None = None
    ) -> None:
        """Let these clients in; without `clients`, whoever comes."""
        self.limits, self.clients, self.counts = limits or Limits(), clients, Counts()
        self.peers: dict[tuple[str, int], Peer] = {}  # of the open connections, by address and port
        self._upstream = upstream
        self._open = {f"/v1/fleet/{call}": {"POST"} for call in (*CALLS, *(KEYLESS_CALLS if clients is None else ()))}
        self._open[HEALTH] = {"GET", "HEAD"}
        self._busy = Counter[str]()  # requests that are served now, by the names of their shares
        self._uploaded, self._slow, self._minute = Counter[str](), Counter[str](), 0  # bytes and slow bodies, by name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.counts.requests += 1
        headers = {name.decode("latin1"): value for name, value in reversed(scope["headers"])}  # the first one counts
        try:
            path = self._route(scope, headers)
            shares, kept = self._shares(path, scope, headers)
            with self._turn(shares, kept):
                body = await self._body(headers, receive, shares) if scope["method"] == "POST" else None
                answer = await self._ask(scope["method"], path, headers, body)
                await self._pass_on(answer, send)
        except Refused as no:
            self.refuse(scope, no)
            await self._answer(no, send)
            await self._drain(receive)
            await send({"type": "http.response.body"})
        except asyncio.CancelledError:
            closing = Refused(503, "closing", retry=5)
            self.refuse(scope, closing)
            await self._answer(closing, send)
            await send({"type": "http.response.body"})

    def refuse(self, scope: Scope, no: Refused) -> None:
        """Count a refused request and log it, in ASCII whatever was sent."""
        self.counts.refused[no.reason] += 1
        line = {
            "event": "refused",
            "at": utc_timestamp(time.time()),
            "peer": _peer(scope),
            "method": scope.get("method", "")[:16],
            "path": scope.get("raw_path", b"").decode("latin1")[:120],
            "status": no.status,
            "reason": no.reason,
            **({"key": no.key} if no.key else {}),
        }
        log.warning(json.dumps(line))

    def _route(self, scope: Scope, headers: dict[str, bytes]) -> str:
        """The open path that the raw path is equal to, character by character. Raises `Refused`."""
        path: str = scope["raw_path"].decode("latin1")
        if path not in self._open or scope["query_string"]:
            raise Refused(404, "path")
        if scope["method"] not in self._open[path]:
            raise Refused(404, "method")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise Refused(400, "two lengths")
        if scope["method"] != "POST" and _has_body(headers):
            raise Refused(400, "a body with no POST")
        return path

    def _shares(self, path: str, scope: Scope, headers: dict[str, bytes]) -> tuple[Sequence[Share], int]:
        """What a request is counted under, the narrowest last, and how many places there are its client's own.

        Raises `Refused` for a call that no client of the deployment has signed.
        """
        limits = self.limits
        if self.clients is None:
            return _shares_without_keys(network(_peer(scope)), headers, limits), 0
        if path == HEALTH:
            return [Share("strangers", limits.strangers)], 0
        try:
            name = self.clients.signer(headers, time.time())
        except NotSigned as e:
            raise Refused(401, str(e), key=key_fingerprint(headers.get(KEY_HEADER, b""))) from None
        if peer := self.peers.get(scope["client"]):
            if peer.certified not in (None, name):
                raise Refused(401, "another's certificate")
            peer.client = name
        clients = Share("clients", limits.concurrent)
        return [clients, Share(f"client {name}", limits.per_client, limits.uploads)], limits.kept

    @contextmanager
    def _turn(self, shares: Sequence[Share], kept: int) -> Iterator[None]:
        """Count a request that is served now, under all of its shares.

        Raises `Refused` where a share has no place left; fewer than `kept` requests of the narrowest share always have.
        """
        is_full = any(self._busy[share.name] >= share.at_once for share in shares)
        if is_full and self._busy[shares[-1].name] >= kept:
            raise Refused(503, "too many requests at once", retry=1)
        self._check_minute(shares)
        names = [share.name for share in shares]
        self._busy.update(names)
        try:
            yield
        finally:
            self._busy.subtract(names)
            self._busy = +self._busy  # drops the names that nobody uses any more

    def _check_minute(self, shares: Sequence[Share]) -> None:
        """Raises `Refused` for a client that has sent its bytes, or its slow bodies, of this minute."""
        now = time.monotonic()
        if self._minute != now // 60:
            self._minute, self._uploaded, self._slow = int(now // 60), Counter(), Counter()
        wait = 60 - int(now % 60)
        if any(self._uploaded[share.name] >= share.a_minute for share in shares):
            raise Refused(503, "too many bytes a minute", retry=wait)
        if self._slow[shares[-1].name] >= self.limits.slow:
            raise Refused(503, "too many slow bodies a minute", retry=wait)

    async def _body(self, headers: dict[str, bytes], receive: Receive, shares: Sequence[Share]) -> bytes:
        """The whole body, counted as it comes, as a promised length can be false or missing. Raises `Refused`."""
        if int(headers.get("content-length", b"0")) > self.limits.body:
            raise Refused(413, "body too large")
        body, more, began, names = bytearray(), True, time.monotonic(), [share.name for share in shares]
        while more:
            try:
                message = await self._next_part(receive, self._latest(began, len(body)))
            except TimeoutError:
                self._slow[names[-1]] += 1
                raise Refused(408, "slow body") from None
            part = message.get("body", b"")
            body += part
            self.counts.bytes_in += len(part)
            self._uploaded.update(dict.fromkeys(names, len(part)))
            if len(body) > self.limits.body:
                raise Refused(413, "body too large")
            more = message.get("more_body", False)
        return bytes(body)

    def _latest(self, began: float, size: int) -> float:
        """When, by time.monotonic(), the next part must be there of a body of which `size` bytes are.

        The limit of patience is for one part; the slowest rate is for the body as it is; the last limit for all of it.
        """
        limits = self.limits
        rate_broken = began + limits.grace + size / limits.slowest
        return min(time.monotonic() + limits.patience, rate_broken, began + limits.whole)

    async def _next_part(self, receive: Receive, latest: float) -> Message:
        """The next part of a body. Raises `TimeoutError` after `latest`, and `Refused` where the client has gone."""
        async with asyncio.timeout(latest - time.monotonic()):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "broken off")
        return message

    async def _ask(self, method: str, path: str, headers: dict[str, bytes], body: bytes | None) -> httpx.Response:
        """The SuperLink's answer, as soon as its headers are there. Raises `Refused`."""
        kept = [(name.encode(), value) for name, value in headers.items() if name in HEADERS]
        request = self._upstream.build_request(method, path, headers=kept, content=body)
        try:
            return await self._upstream.send(request, stream=True)
        except httpx.ReadTimeout:
            raise Refused(504, "SuperLink is slow", retry=5) from None
        except httpx.TransportError:
            raise Refused(502, "SuperLink is down", retry=5) from None

    async def _pass_on(self, answer: httpx.Response, send: Send) -> None:
        """Send the SuperLink's answer to the client, piece by piece."""
        try:
            passed = [(name, value) for name, value in answer.headers.raw if name.decode().lower() not in HOP_BY_HOP]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": passed})
            async for part in answer.aiter_raw():
                self.counts.bytes_out += len(part)
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})
        except (httpx.TransportError, asyncio.CancelledError):
            self.counts.refused["answer broken off"] += 1  # uvicorn closes a connection whose answer has no end
        finally:
            await answer.aclose()

    async def _answer(self, no: Refused, send: Send) -> None:
        """Begin the answer to a refused request; its last part is sent when the rest of the request was dropped."""
        retry = [(b"retry-after", str(no.retry).encode())] if no.retry else []
        headers = [(b"content-length", b"0"), CLOSE, *retry]
        await send({"type": "http.response.start", "status": no.status, "headers": headers})
        await send({"type": "http.response.body", "more_body": True})

    async def _drain(self, receive: Receive) -> None:
        """Drop what is still coming, for a second: to close the connection at once would lose the answer too."""
        dropped, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while more and dropped < self.limits.body:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    more = message.get("more_body", False)


def _peer(scope: Scope) -> str:
    """The address of the other side; empty where it is not known."""
    return str((scope.get("client") or ("",))[0])


def network(address: str) -> str:
    """The name under which an address is counted: of IPv6 the first half, as one site has 2^64 addresses there.

    An IPv4 address that a socket of both families shows within an IPv6 address is counted as itself.
    """
    if ":" not in address:
        return address
    shown = IPv6Address(address)
    return str(shown.ipv4_mapped or ":".join(shown.exploded.split(":")[:4]))


def _has_body(headers: Mapping[str, bytes]) -> bool:
    """Does a request say that it has a body?"""
    return "transfer-encoding" in headers or headers.get("content-length", b"0") != b"0"


def _shares_without_keys(address: str, headers: Mapping[str, bytes], limits: Limits) -> Sequence[Share]:
    """What a request is counted under where clients have no keys: all, its address, and its client.

    A client's name holds the address too; by the claimed key alone a stranger could use up the client's share.
    """
    return [
        Share("all", limits.concurrent),
        Share(address, limits.per_address, 4 * limits.uploads),
        Share(f"{address} {sha256(headers.get(KEY_HEADER, b'')).hexdigest()}", limits.per_client, limits.uploads),
    ]
