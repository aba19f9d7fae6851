"""The gateway between clients and the SuperLink, as our process and as nginx, over TLS, before a server that records.

Nothing that no SuperNode says may come through. Every test reads what reached the other side.
"""

# ruff: noqa: F811

import re
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlora.deployment.provision import provision
from fedlora.server.deployment.gate_rules import CALLS, HEADERS, KEYLESS_CALLS, Limits
from fedlora.server.deployment.node_signatures import KEY_HEADER
from tests.support.gateways import (  # noqa: F401
    LARGE,
    OPEN,
    PATIENCE,
    PULL,
    ROOT,
    Gate,
    SuperLink,
    answer,
    ask,
    free,
    gate,
    head,
    private_key,
    shared,
    signed,
    start_gate,
    start_nginx,
    superlink,
    wait,
)

TRICKS = [
    *(
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/",
        "*",
        "/v1/fleet/",
        "/v1/fleet",
    ),
    *("/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "//v1/control/start-run"),
    *("/v1/fleet/pull-messages/../../control/x", "/v1/fleet/pull-messages/", "/v1//fleet/pull-messages"),
    *(
        "/V1/FLEET/PULL-MESSAGES",
        "/v1/fleet/pull%2dmessages",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/./pull-messages",
    ),
    *("/v1/fleet/pull-messages;/../../control/x", "/v1/fleet/pull-messages#/v1/control", "/v1/fleet\\..\\control\\x"),
    *("http://superlink:8000/v1/control/start-run", "http://localhost/v1/fleet/pull-messages", "superlink:8000"),
    *(
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/health/../v1/control/start-run",
        "/v1/fleet/get-run%00",
    ),
]
HIDDEN = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
SMUGGLED = {
    "both lengths": b"Content-Length: 70\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n46\r\n" + HIDDEN + b"\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 70\r\n\r\n",
    "a sign": b"Content-Length: +0\r\n\r\n",
    "a space": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "another coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "twice chunked": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "no chunk": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "two hosts": b"Host: superlink\r\nContent-Length: 0\r\n\r\n",
}


def test_the_calls_and_headers_are_flowers() -> None:
    fleet = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert {f"/v1/fleet/{call}" for call in (*CALLS, *KEYLESS_CALLS)} == fleet


def test_nginx_says_what_the_gate_says() -> None:
    text = (ROOT / "deploy" / "proxy" / "nginx.conf").read_text()
    route = re.search(r"/v1/fleet/\(\?:([a-z|-]+)\)", text)
    assert route and set(route[1].split("|")) == set(CALLS)
    assert {h.lower() for h in re.findall(r"proxy_set_header (\S+) \$http_", text)} == HEADERS
    limits = Limits()
    assert f"client_max_body_size {limits.body >> 20}m;" in text
    for share, most in {"all": limits.concurrent, "client": limits.per_client, "strangers": limits.strangers}.items():
        assert f"limit_conn {share} {most};" in text


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/kubernetes/server.yaml"])
def test_in_containers_nginx_is_the_gateway(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "fedlora-proxy" in text and "deployment.gate" not in text


def test_what_a_supernode_says_goes_through_whole(gate: Gate, superlink: SuperLink) -> None:
    key = private_key(superlink.certificates.parent / "clients" / "site")
    signs = [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
    ca = str(gate.certificates / "ca.crt")
    with FleetHttpClient.from_server_address(f"localhost:{gate.port}", False, ca, signs) as client:
        sent: list[httpx.Request] = []
        client._client.event_hooks["request"].append(sent.append)
        client.PullMessages(PullMessagesRequest())
    (_, path, headers, body), ours = superlink.seen[0], {n: v for n, v in sent[0].headers.items() if "flwr" in n}
    assert path == "/v1/fleet/pull-messages" and body == sent[0].content and len(ours) >= 6
    assert {name: headers[name] for name in ours} == ours and headers["content-type"] == "application/protobuf"


@pytest.mark.parametrize("method, path", sorted(OPEN))
def test_each_open_call_is_answered(gate: Gate, superlink: SuperLink, method: str, path: str) -> None:
    assert ask(gate, f"{method} {path} HTTP/1.1", b"1" if method == "POST" else b"")[0] == 200
    assert [(m, p) for m, p, _, _ in superlink.seen] == [(method, path)]


@pytest.mark.parametrize("method", ["POST", "GET", "CONNECT"])
@pytest.mark.parametrize("path", TRICKS)
def test_no_other_path_goes_through(gate: Gate, superlink: SuperLink, method: str, path: str) -> None:
    status, headers, body = ask(gate, f"{method} {path} HTTP/1.1")
    assert status in (400, 404, 405) and body == b"" and not superlink.seen
    assert "uvicorn" not in str(headers) and "nginx/" not in str(headers)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "post", "HEAD"])
def test_no_other_method_goes_through(gate: Gate, superlink: SuperLink, method: str) -> None:
    assert ask(gate, f"{method} /v1/fleet/pull-messages HTTP/1.1")[0] in (400, 404, 405)
    assert not superlink.seen


@pytest.mark.parametrize("way", SMUGGLED)
def test_no_request_hides_in_another(gate: Gate, superlink: SuperLink, way: str) -> None:
    with gate.connect() as conn:
        named = head(PULL, signed(gate.certificates) | {"Host": "localhost"}).removesuffix(b"\r\n")
        conn.sendall(named + SMUGGLED[way] + HIDDEN)
        assert answer(conn)[0] in (0, 400, 501)
    time.sleep(0.05)
    assert not superlink.seen


def test_the_second_request_of_a_connection_is_judged_too(gate: Gate, superlink: SuperLink) -> None:
    with gate.connect() as conn:
        conn.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 0}) + HIDDEN)
        assert [answer(conn)[0]] == [200]
        time.sleep(0.1)
    assert len(superlink.seen) == 1


def test_a_host_leads_nowhere_else(gate: Gate, superlink: SuperLink) -> None:
    for host in ("superlink:8000/v1/control/start-run", "localhost@superlink", "x/../v1/control", "127.0.0.1:1"):
        assert ask(gate, Host=host)[0] in (200, 400)
    assert {headers["host"].split(":")[0] for _, _, headers, _ in superlink.seen} <= {"127.0.0.1", "superlink"}


def test_only_known_headers_go_on(gate: Gate, superlink: SuperLink) -> None:
    extra = {
        "X_Forwarded_For": "10.0.0.1",
        "Forwarded": "for=x",
        "TE": "trailers",
        "Authorization": "x",
        "Cookie": "a=b",
    }
    ask(gate, Flwr_Task_Token="t", Upgrade="websocket", Keep_Alive="1", Expect="100-continue", **extra)
    passed = {"host", "content-length", "accept-encoding", "user-agent", "connection"}
    assert set(superlink.seen[0][2]) <= HEADERS | passed and superlink.seen[0][2][KEY_HEADER]


def test_a_large_answer_comes_whole(gate: Gate) -> None:
    assert ask(gate, "POST /v1/fleet/pull-object HTTP/1.1")[2] == LARGE


def test_a_refusal_of_the_superlink_comes_as_it_is(gate: Gate) -> None:
    status, headers, _ = ask(gate, body=b"unknown")
    assert status == 401 and headers["flwr-version-incompatibility-message"] == "none"


def test_a_body_of_a_chunk_of_flowers_goes_through(gate: Gate, superlink: SuperLink) -> None:
    assert ask(gate, "POST /v1/fleet/push-object HTTP/1.1", LARGE)[0] == 200
    assert superlink.seen[0][3] == LARGE


def test_a_superlink_that_is_down_is_waited_for(gate: Gate, superlink: SuperLink) -> None:
    superlink.stop()
    status, headers, body = ask(gate)
    superlink.start()
    assert (status, headers["Retry-After"], body) == (502, "5", b"")
    assert ask(gate)[0] == 200


def test_a_superlink_with_another_certificate_is_not_believed(gate: Gate, superlink: SuperLink, tmp_path: Path) -> None:
    provision(tmp_path, ["localhost"], ["site"])
    superlink.stop()
    impostor = SuperLink(tmp_path / "server", superlink.port)
    impostor.start()
    status = ask(gate)[0]
    impostor.stop()
    superlink.start()
    assert status == 502 and not impostor.seen


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, None], ids=["TLS 1.1", "no TLS"])
def test_an_old_protocol_is_not_spoken(gate: Gate, superlink: SuperLink, version: ssl.TLSVersion | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", gate.port), timeout=10) as plain:
        if version is None:
            plain.sendall(head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 0}))
            assert b" 200 " not in plain.recv(99)
        else:
            context.minimum_version = context.maximum_version = version
            context.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(plain)
    assert not superlink.seen


def test_a_refusal_is_a_line_in_the_log(gate: Gate) -> None:
    ask(gate, "POST /v1/control/" + "x" * 300 + "\x01 HTTP/1.1")
    ask(gate, 'POST /v1/control/"list-nodes" HTTP/1.1')
    time.sleep(0.1)
    last = gate.lines()[-1]
    assert last["peer"] == "127.0.0.1" and last["method"] == "POST" and last["status"] == 404
    assert last["path"] == '/v1/control/"list-nodes"'
    assert max(len(str(line["path"])) for line in gate.lines() if "path" in line) <= 120


def test_a_length_that_is_too_short_hides_nothing(gate: Gate, superlink: SuperLink) -> None:
    with gate.connect() as conn:
        conn.sendall(
            head(PULL, signed(gate.certificates) | {"Host": "localhost", "Content-Length": 2}) + b"okXX" + HIDDEN
        )
        assert answer(conn)[0] == 200
        time.sleep(0.05)
    assert [body for _, _, _, body in superlink.seen] == [b"ok"]
