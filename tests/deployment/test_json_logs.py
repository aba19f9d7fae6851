"""Structured logs: every line is an object that says what it is about."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from fedlora.deployment.json_logs import log_context, log_json
from fedlora.errors import ConfigError

log = logging.getLogger("fedlora")


@pytest.fixture
def stream() -> Iterator[StringIO]:
    """Where the logs of a test go."""
    stream = StringIO()
    close = log_json(stream, side="server")
    yield stream
    close()


@pytest.fixture
def people() -> Iterator[StringIO]:
    """What a person reads, of any logger."""
    handler = logging.StreamHandler(StringIO())
    logging.getLogger().addHandler(handler)
    yield handler.stream
    logging.getLogger().removeHandler(handler)


def lines(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_where_and_what(stream: StringIO) -> None:
    log.warning("client %d failed: %s", 3, "no\nanswer \x1b[2J é")
    (line,) = lines(stream)
    assert line.pop("at").endswith("Z")
    assert line == {
        "side": "server",
        "level": "warning",
        "logger": "fedlora",
        "message": "client 3 failed: no\\nanswer \\x1b[2J é",
    }
    assert stream.getvalue().rstrip("\n").isprintable()


def test_what_is_logged_within_is_about_its_run_round_and_client(stream: StringIO) -> None:
    with log_context(run="a1", round=2):
        with log_context(client=7):
            log.info("inner")
        log.info("outer", extra={"client": 8, "round": 3, "other": 1})
    log.info("after")
    said = [{k: line.get(k) for k in ("run", "round", "client")} for line in lines(stream)]
    assert said[0] == {"run": "a1", "round": 2, "client": 7}
    assert said[1] == {"run": "a1", "round": 3, "client": 8} and "other" not in lines(stream)[1]
    assert said[2] == {"run": None, "round": None, "client": None} and "run" not in lines(stream)[2]


def test_threads_are_each_about_their_own_client(stream: StringIO) -> None:
    def work(client: int) -> None:
        with log_context(client=client):
            log.info("%d", client)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))
    assert sorted(line["client"] for line in lines(stream)) == list(range(40))
    assert all(line["message"] == str(line["client"]) for line in lines(stream))


def test_an_exception_is_one_field(stream: StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")
    (line,) = lines(stream)
    assert line["message"] == "it failed" and line["level"] == "error"
    assert line["exception"].startswith("Traceback") and "ValueError: two\nlines" in line["exception"]


def test_people_keep_their_lines_beside_a_file(people: StringIO, tmp_path: Path) -> None:
    close = log_json(tmp_path / "logs" / "server.jsonl")
    log.warning("to both")
    close()
    assert people.getvalue() == "to both\n"
    assert json.loads((tmp_path / "logs" / "server.jsonl").read_text())["message"] == "to both"


def test_lines_for_people_do_not_mix_with_those_of_a_stream(people: StringIO, stream: StringIO) -> None:
    log.warning("to the stream alone")
    assert not people.getvalue() and len(lines(stream)) == 1


def test_closed_it_leaves_the_logger_as_it_was() -> None:
    before = log.level, log.propagate, list(log.handlers)
    log_json(StringIO())()
    assert (log.level, log.propagate, list(log.handlers)) == before


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "server.jsonl"
    close = log_json(path)
    log.warning("one")
    path.rename(tmp_path / "server.jsonl.1")
    log.warning("two")
    close()
    assert [json.loads(p.read_text())["message"] for p in (tmp_path / "server.jsonl.1", path)] == ["one", "two"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/log cannot be written"):
        log_json(tmp_path / "file" / "log")
