"""What a client's screen says of its connection: each thing once, with its name, and ever rarer."""

import sys
from pathlib import Path

import pytest

from fedlora.client.deployment.connection import ServerConnection
from fedlora.client.deployment.supervisor import client_options, worker_command, write_identity
from fedlora.deployment.processes import Process
from fedlora.errors import ConfigError

TAKEN = "INFO :      SuperNode ID: 7\n"
SILENT = "WARNING :   Connection attempt failed, retrying in 1.00 seconds\n"
ANSWERS = "INFO :      Connection successful after 3.00 seconds and 3 tries.\n"
REFUSED = "print('[code: 2004] Failed to activate SuperNode.'); raise SystemExit(1)"


@pytest.fixture
def connection() -> ServerConnection:
    return ServerConnection("hospital-a", "fed.example.org:8443")


def ended(code: str, log: Path) -> Process:
    """A process that has done this and ended."""
    process = Process("SuperNode", [sys.executable, "-c", code], log)
    process.start()
    process.wait(60)
    return process


def test_it_is_connected_once_the_key_is_taken(connection: ServerConnection) -> None:
    assert connection.news("INFO :      Starting Flower SuperNode\n") == []
    assert connection.news(TAKEN) == [
        "connected: fed.example.org:8443 has taken the key of hospital-a, which takes part in its runs"
    ]


def test_a_server_that_is_away_and_back_is_said_once_each(connection: ServerConnection) -> None:
    said = connection.news(TAKEN + 9 * SILENT) + connection.news(9 * SILENT) + connection.news(9 * ANSWERS)
    assert [line.split(": ")[0] for line in said] == [
        "connected",
        "fed.example.org:8443 does not answer",
        "fed.example.org:8443 answers again, after 0 s",
    ]
    assert "the line is lost, or the server was ended" in said[1]


def test_a_server_that_is_away_after_the_last_round_has_ended_its_run(connection: ServerConnection) -> None:
    connection.news(TAKEN)
    connection.answered("round 2 of 3: 96 bytes leave for the server, of 2 tensors\n")
    assert "round 2 of 3 was the last that this client was asked for" in connection.news(SILENT)[0]
    connection.news(ANSWERS)
    connection.answered("round 3 of 3: 96 bytes leave for the server, of 2 tensors\n")
    assert "its run has ended, after round 3 of 3; waiting for its next run" in connection.news(SILENT)[0]


def test_a_key_that_is_refused_is_tried_ever_rarer_once_it_cannot_be_merely_in_use(
    connection: ServerConnection, tmp_path: Path
) -> None:
    node = ended(REFUSED, tmp_path / "log")
    refusals = [connection.ended(node) for _ in range(13)]
    assert [r.pause for r in refusals] == [10] * 8 + [20, 40, 80, 120, 120]
    assert "less than a minute ago" in refusals[0].reason and "less than a minute ago" not in refusals[-1].reason
    assert all("was removed or is not registered there" in r.reason for r in refusals)
    connection.news(TAKEN)
    assert connection.ended(node).pause == 10


def test_a_session_that_the_server_ended_is_not_a_refusal(connection: ServerConnection, tmp_path: Path) -> None:
    node = ended("", tmp_path / "log")
    connection.news(TAKEN)
    assert "its session has ended" in connection.ended(node).reason
    assert "does not take this key" in connection.ended(node).reason


def test_a_supernode_that_gave_up_is_not_taken_for_a_refusal(connection: ServerConnection, tmp_path: Path) -> None:
    connection.news("ERROR :     SSL/TLS handshake error detected.\n")
    assert connection.gave_up
    assert "gave up on a connection" in connection.ended(ended("", tmp_path / "log")).reason
    assert not connection.gave_up


def test_what_a_client_is_told_stands_in_no_command_line(tmp_path: Path) -> None:
    options = client_options("localhost", None, tmp_path, 3, {"data.path": "/private/notes.jsonl"})
    write_identity(options, tmp_path / "identity.json")
    assert "notes.jsonl" not in " ".join(worker_command(tmp_path / "s", tmp_path / "identity.json"))
    assert (tmp_path / "identity.json").stat().st_mode & 0o777 == 0o600


def test_a_url_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"https://localhost:18443/fed.*without https:// and without a path"):
        client_options("https://localhost:18443/fed", None, tmp_path, 3, {})
