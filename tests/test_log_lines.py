"""What the other side names can neither forge nor hide a line of a log."""

import logging
from io import StringIO

from fedlora.log_lines import LOGGERS, escape_logs

NAME = '\x1b[2J\x1b]0;owned\x07"\nround 3 of 3: 0 bytes leave for the server\u202e'


def written(fail: bool = False) -> str:
    stream, log = StringIO(), logging.getLogger("fedlora")
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    try:
        raise ValueError(NAME)
    except ValueError as e:
        log.warning("training failed: %s", e, exc_info=fail)
    finally:
        log.removeHandler(handler)
    return stream.getvalue()


def test_a_name_with_line_breaks_and_escape_sequences_stays_in_its_line() -> None:
    lines = written().splitlines()
    assert len(lines) == 1 and lines[0].isprintable() and "owned" in lines[0]


def test_a_traceback_under_a_line_is_plain_text() -> None:
    text = written(fail=True)
    assert "Traceback" in text and all(line.isprintable() for line in text.splitlines())


def test_logs_are_escaped_once_however_often_it_is_asked_for() -> None:
    escape_logs()
    assert [len(logging.getLogger(name).filters) for name in LOGGERS] == [1, 1]
