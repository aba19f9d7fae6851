"""A request's signature, as Flower's own SuperNode makes it, by the clock and the keys of the server."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.common import constant as common
from flwr.supercore import constant
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlora.deployment.provision import provision, remove
from fedlora.server.deployment import node_signatures
from fedlora.server.deployment.node_signatures import NotSigned, known_clients
from tests.support.gateways import private_key, signed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    provision(folder, ["localhost"], ["site", "other", "removed"])
    remove_later = signed(folder / "server", "removed")
    (folder / "removed.txt").write_text("\n".join(f"{name}: {value}" for name, value in remove_later.items()))
    remove(folder, "removed")
    return folder / "server"


def signer(folder: Path, headers: dict[str, object], now: datetime | None = None) -> str:
    as_sent = {name: str(value).encode() for name, value in headers.items()}
    return known_clients(folder).signer(as_sent, (now or datetime.now(UTC)).timestamp())


def test_headers_and_tolerances_are_flowers() -> None:
    assert node_signatures.KEY_HEADER == constant.FLEET_HTTP_PUBLIC_KEY_HEADER
    assert node_signatures.SIGNATURE_HEADER == constant.FLEET_HTTP_SIGNATURE_HEADER
    assert node_signatures.TIME_HEADER == common.TIMESTAMP_HEADER
    assert node_signatures.BEHIND == common.SYSTEM_TIME_TOLERANCE
    assert node_signatures.LASTS == common.TIMESTAMP_TOLERANCE + common.SYSTEM_TIME_TOLERANCE


def test_a_request_that_flowers_supernode_signed_is_its_clients(folder: Path) -> None:
    key = private_key(folder.parent / "clients" / "site")
    request = httpx.Request("POST", "https://localhost/v1/fleet/pull-messages")
    context = type("Context", (), {"request": request})()
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda _: httpx.Response(200))
    assert signer(folder, dict(request.headers)) == "site"


def test_a_key_of_nobody_is_not_known(folder: Path, tmp_path: Path) -> None:
    provision(tmp_path, ["localhost"], ["site"])
    with pytest.raises(NotSigned, match="unknown key"):
        signer(folder, signed(tmp_path / "server"))
    with pytest.raises(NotSigned, match="unknown key"):
        signer(folder, {})


def test_a_removed_clients_key_is_known_no_more(folder: Path) -> None:
    lines = (folder.parent / "removed.txt").read_text().splitlines()
    with pytest.raises(NotSigned, match="unknown key"):
        signer(folder, dict(line.split(": ", 1) for line in lines))


def test_a_known_key_with_anothers_signature_is_false(folder: Path) -> None:
    mine, others = signed(folder, "site"), signed(folder, "other")
    with pytest.raises(NotSigned, match="false signature"):
        signer(folder, others | {node_signatures.KEY_HEADER: mine[node_signatures.KEY_HEADER]})


@pytest.mark.parametrize("signature", ["", "?", "QQ==", "ü"])
def test_a_signature_that_is_none_is_false(folder: Path, signature: str) -> None:
    with pytest.raises(NotSigned, match="false signature"):
        signer(folder, signed(folder) | {node_signatures.SIGNATURE_HEADER: signature})


@pytest.mark.parametrize("seconds", [-306, 6])
def test_a_signature_out_of_its_time_is_old(folder: Path, seconds: int) -> None:
    with pytest.raises(NotSigned, match="old signature"):
        signer(folder, signed(folder, at=datetime.now(UTC) + timedelta(seconds=seconds)))


@pytest.mark.parametrize("text", ["", "now", "2026-11-30T00:00:00", "9" * 99])
def test_a_time_that_is_none_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(NotSigned, match="no time"):
        signer(folder, signed(folder) | {node_signatures.TIME_HEADER: text})
