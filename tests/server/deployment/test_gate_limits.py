"""How much a client may ask of the two gateways to the SuperLink, and for how long."""

# ruff: noqa: F811

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedlora.server.deployment.node_signatures import KEY_HEADER
from tests.support.gateways import (  # noqa: F401
    PATIENCE,
    PULL,
    Gate,
    SuperLink,
    answer,
    ask,
    free,
    gate,
    head,
    keyless,
    own,
    shared,
    signed,
    superlink,
)

HEALTH = head("GET /health HTTP/1.1", {"Host": "x"})


@pytest.mark.parametrize("said", ["all of it", "no length"])
def test_a_body_over_the_limit_is_cut_off(gate: Gate, superlink: SuperLink, said: str) -> None:
    length = {"Content-Length": 9 << 20} if said == "all of it" else {"Transfer-Encoding": "chunked"}
    with gate.connect() as conn:
        conn.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", **length}))
        if said == "no length":
            for _ in range(8):
                conn.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            conn.sendall(b"1\r\nx\r\n")
        assert answer(conn)[0] == 413
    assert not superlink.seen


def test_who_falls_silent_is_sent_away(gate: Gate, superlink: SuperLink) -> None:
    half = head(PULL, signed(gate.certificates) | {"Host": "x", "Content-Length": 9}) + b"1234"
    began = time.monotonic()
    with ExitStack() as stack:
        silent = [stack.enter_context(gate.connect()) for _ in range(4)]
        for conn, sent in zip(silent, (b"", PULL[:9].encode(), half, HEALTH + PULL[:9].encode()), strict=True):
            conn.sendall(sent)
        assert answer(silent[3])[0] == 200
        assert all(answer(conn)[0] in (0, 408) for conn in silent)
        assert PATIENCE - 0.5 < time.monotonic() - began < 2 * PATIENCE
    assert [path for _, path, _, _ in superlink.seen] == ["/health"]


def test_headers_without_end_are_refused(gate: Gate, superlink: SuperLink) -> None:
    with gate.connect() as conn:
        conn.sendall(head(PULL, {f"X-{n}": "x" * 1000 for n in range(40)}))
        assert answer(conn)[0] in (0, 400, 431)
    assert not superlink.seen


def test_a_client_may_have_eight_requests_at_once(gate: Gate) -> None:
    half = head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 9}) + b"1234"
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(gate.connect()).sendall(half)
        time.sleep(0.1)
        status, headers, _ = ask(gate)
        assert status == 503 and headers["Retry-After"] == "1"
        assert ask(gate, client="other")[0] == 200
    time.sleep(0.1)
    assert ask(gate)[0] == 200


def test_sixty_four_trickling_bodies_of_strangers_keep_no_heartbeat_out(gate: Gate, superlink: SuperLink) -> None:
    """From two addresses, with the authority's certificate and no key, or a key of their own."""
    stranger, half = {KEY_HEADER: "QQ" * 144}, {"Host": "localhost", "Content-Length": 999}
    with ExitStack() as stack:
        for n in range(64):
            conn = stack.enter_context(gate.connect(source=f"127.0.0.{2 + n % 2}"))
            conn.sendall(head(PULL, half | (stranger if n % 3 else {})) + b"1")
        for _ in range(4):
            assert ask(gate, "POST /v1/fleet/send-node-heartbeat HTTP/1.1", b"here")[0] == 200
            time.sleep(0.1)
    assert {path for _, path, _, _ in superlink.seen} == {"/v1/fleet/send-node-heartbeat"}


def test_strangers_who_ask_for_its_health_have_places_of_their_own(gate: Gate) -> None:
    """A request for it with a body, which could trickle, is refused."""
    assert ask(gate, "GET /health HTTP/1.1", client="")[0] == 200
    assert ask(gate, "GET /health HTTP/1.1", b"x", client="")[0] == 400


def test_however_busy_the_others_are_a_client_has_places_of_its_own(own: Callable[..., Gate]) -> None:
    gate = own("--limit-concurrent=3")
    with ExitStack() as stack:
        for _ in range(3):
            conn = stack.enter_context(gate.connect())
            conn.sendall(head(PULL, signed(gate.certificates, "other") | {"Host": "x", "Content-Length": 9}) + b"1234")
        time.sleep(0.1)
        assert ask(gate, client="other")[0] == 503
        assert ask(gate, client="site")[0] == 200


def test_without_keys_an_address_may_not_multiply_by_claiming_others(keyless: Gate) -> None:
    with ExitStack() as stack:
        for n in range(32):
            half = head(PULL, {"Host": "localhost", KEY_HEADER: f"{n}" * 99, "Content-Length": 9}) + b"1234"
            stack.enter_context(keyless.connect()).sendall(half)
        time.sleep(0.1)
        assert ask(keyless, client="")[0] == 503


def test_what_a_client_uploads_in_a_minute_has_an_end(own: Callable[..., Gate]) -> None:
    gate = own("--limit-uploads=1000000")
    for _ in range(2):  # a clock's minute may end between the uploads
        statuses = [ask(gate, body=bytes(600_000)) for _ in range(3)]
        if statuses[-1][0] == 503:
            break
    assert [s for s, _, _ in statuses] == [200, 200, 503] and 1 <= int(statuses[-1][1]["Retry-After"]) <= 60
    assert ask(gate, body=b"x", client="other")[0] == 200


@pytest.mark.parametrize("limits", [["--limit-whole=0.5"], ["--limit-grace=0.2", "--limit-slowest=100"]], ids=str)
def test_a_body_that_trickles_has_an_end(own: Callable[..., Gate], limits: list[str]) -> None:
    gate = own(*limits)
    with gate.connect() as conn:
        conn.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 99}))
        for _ in range(8):
            conn.sendall(b"x")
            time.sleep(0.1)
        assert answer(conn)[0] == 408


def test_a_body_that_comes_at_the_least_rate_is_not_cut_off(own: Callable[..., Gate]) -> None:
    gate = own("--limit-grace=0.2", "--limit-slowest=100")
    with gate.connect() as conn:
        conn.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 400}))
        for _ in range(8):
            conn.sendall(bytes(50))
            time.sleep(0.1)
        assert answer(conn)[0] == 200


def test_who_trickles_again_and_again_has_to_wait(own: Callable[..., Gate]) -> None:
    gate = own("--limit-grace=0.1", "--limit-slow=2")
    half = {"Host": "localhost", "Content-Length": 9}
    for _ in range(2):  # a clock's minute may end between them
        said = [trickle(gate, half) for _ in range(3)]
        if said[-1][0] == 503:
            break
    assert [status for status, _ in said] == [408, 408, 503] and 1 <= int(said[-1][1]["Retry-After"]) <= 60
    assert ask(gate, client="other")[0] == 200


def trickle(gate: Gate, headers: dict[str, object]) -> tuple[int, Mapping[str, str]]:
    with gate.connect() as conn:
        conn.sendall(head(PULL, signed(gate.certificates) | headers) + b"1")
        return answer(conn)[:2]


def test_connections_have_an_end_and_the_oldest_stranger_goes_first(own: Callable[..., Gate]) -> None:
    gate = own("--limit-connections=8")  # the strangers of an address may have a quarter

    def asks(conn: socket.socket) -> int:
        conn.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 0}))
        return answer(conn)[0]

    with gate.connect() as known:
        assert asks(known) == 200
        with gate.connect() as oldest, gate.connect() as younger, gate.connect() as newest:
            assert [asks(newest), asks(younger), asks(known)] == [200, 200, 200]
            assert answer(oldest)[0] == 0


def test_it_ends_within_three_seconds_whoever_is_connected(own: Callable[..., Gate]) -> None:
    gate = own()
    with gate.connect(), gate.connect() as busy:
        busy.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 9}) + b"1234")
        time.sleep(0.1)
        gate.process.send_signal(signal.SIGTERM)
        assert gate.process.wait(3) == 0
    counts = gate.lines()[-1]
    assert counts["event"] == "closed" and counts["requests"] == 1 and counts["bytes_in"] == 4


def test_without_certificates_it_stays_shut_or_is_told_so(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fedlora.server.deployment.gate",
        f"--port={free()}",
        "--ca",
        str(tmp_path / "none"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: --ca") and "--insecure" in done.stderr


def test_it_knows_no_model_and_no_flower() -> None:
    heavy = "{'torch', 'transformers', 'flwr'}"
    code = f"import sys, fedlora.server.deployment.gate; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
