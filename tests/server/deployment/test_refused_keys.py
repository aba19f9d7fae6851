"""Who asks with a key that is not taken is named on the server's screen, once, and a stranger cannot fill it."""

import json
from pathlib import Path

import pytest

from fedlora.deployment.provision import key_fingerprint, key_header, provision, public_key, remove
from fedlora.server.deployment.refused_keys import RefusedKeys


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """The fingerprints of two clients' keys, the second of which was removed."""
    provision(tmp_path, ["localhost"], ["a", "b"])
    clients = tmp_path / "server" / "clients"
    made = {name: key_fingerprint(key_header(public_key(clients / f"{name}.pub"))) for name in "ab"}
    remove(tmp_path, "b")
    return made


def line(key: str, reason: str = "unknown key") -> str:
    entry = {"event": "refused", "at": "2026-01-01T00:00:00Z", "peer": "10.0.0.3", "reason": reason, "key": key}
    return json.dumps(entry) + "\n"


def test_a_removed_client_is_named_once(tmp_path: Path, keys: dict[str, str]) -> None:
    refused = RefusedKeys(tmp_path / "server")
    said = [*refused.news(3 * line(keys["b"])), *refused.news(line(keys["b"]))]
    assert said == ["b, which was removed, asked to take part and was refused"]


def test_a_stranger_is_told_by_the_address_and_the_key(tmp_path: Path, keys: dict[str, str]) -> None:
    (said,) = RefusedKeys(tmp_path / "server").news(line("f00d"))
    assert "nobody knows here, from 10.0.0.3, key f00d" in said


def test_a_client_whose_clock_is_wrong_is_named(tmp_path: Path, keys: dict[str, str]) -> None:
    (said,) = RefusedKeys(tmp_path / "server").news(line(keys["a"], "old signature"))
    assert said.startswith("a was refused, as its clock")


def test_many_strangers_are_told_in_few_lines(tmp_path: Path, keys: dict[str, str]) -> None:
    refused = RefusedKeys(tmp_path / "server")
    said = refused.news("".join(line(str(i)) for i in range(500)) + "no line of the log\n")
    assert len(said) < 25 and "gate.log has them all" in said[-1]
