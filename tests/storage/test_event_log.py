"""The audit log: whole lines whoever writes, harmless whatever is written, and never a reason for a run to end."""

import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.storage import event_log
from fedlora.storage.event_log import EventLog, entries, sanitised

WRITER = """
import sys
from pathlib import Path
from fedlora.storage.event_log import EventLog
log = EventLog(Path(sys.argv[1]), limit=int(sys.argv[3]), who=int(sys.argv[2]))
for n in range(int(sys.argv[4])):
    log.write("left", n=n, tensors=[f"A model.layers.{i}.q_proj" for i in range(50)])
"""


def together(path: Path, limit: int, lines: int) -> list[tuple[int, int]]:
    """What is kept after four processes have written at once: whose line, and which."""
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(who), str(limit), str(lines)]) for who in range(4)]
    assert [w.wait(60) for w in writers] == [0, 0, 0, 0]
    return [(e["who"], e["n"]) for e in entries(path)]


def test_a_line_says_when_who_and_what(tmp_path: Path) -> None:
    EventLog(tmp_path / "a" / "audit.jsonl", side="client").write(
        "left", what="update", round=3, tensors=["A q", "B q"]
    )
    line = json.loads((tmp_path / "a" / "audit.jsonl").read_text())
    assert list(line) == ["at", "side", "event", "what", "round", "tensors"] and line["tensors"] == ["A q", "B q"]
    assert line["at"].endswith("Z") and len(line["at"]) == len("2026-01-31T12:00:00.123Z")
    assert abs((datetime.fromisoformat(line["at"]) - datetime.now(UTC)).total_seconds()) < 60


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    was = os.umask(0)
    try:
        EventLog(tmp_path / "audit.jsonl").write("left")
    finally:
        os.umask(was)
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    got = together(tmp_path / "audit.jsonl", 2**26, 100)
    assert sorted(got) == [(who, n) for who in range(4) for n in range(100)]
    assert all([n for w, n in got if w == who] == list(range(100)) for who in range(4))
    assert len((tmp_path / "audit.jsonl").read_bytes().splitlines()) == 400


def test_nothing_is_lost_when_several_processes_begin_new_files(tmp_path: Path) -> None:
    got = together(tmp_path / "audit.jsonl", 150_000, 70)  # 1.4 kB a line: two full files and a bit
    assert sorted(got) == [(who, n) for who in range(4) for n in range(70)]
    assert {p.name for p in tmp_path.iterdir()} == {"audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"}
    assert all(p.stat().st_size <= 150_000 for p in tmp_path.iterdir())


def test_three_full_files_are_kept(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "audit.jsonl", limit=200)
    for n in range(50):
        log.write("left", n=n)
    kept = [e["n"] for e in entries(tmp_path / "audit.jsonl")]
    assert len(list(tmp_path.iterdir())) == 4 and kept == list(range(kept[0], 50))
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in tmp_path.iterdir())


def test_a_line_longer_than_a_file_may_be_is_kept_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "audit.jsonl", limit=100)
    for text in ("a" * 400, "b" * 400):
        log.write("left", text=text)
    assert [e["text"][0] for e in entries(tmp_path / "audit.jsonl")] == ["a", "b"]


def test_a_line_cut_short_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"at": "2026", "event": "one"}\n{"at": "2026", "ev')
    EventLog(path).write("three")
    assert [e["event"] for e in entries(path)] == ["one", "three"]


def test_a_full_disk_is_said_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(Path("/dev/full"))
    for _ in range(3):
        log.write("left", what="update")
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert "/dev/full" in said and "No space left on device" in said


def test_the_first_line_after_a_full_disk_says_how_many_are_missing(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the full disk: of the line that reaches it a part is written."""
    path = tmp_path / "audit.jsonl"
    log, was = EventLog(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.write("one")
    whole, before = path.read_bytes(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 30, was[1]))
        log.write("two")
        log.write("three")
        assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, before)
    log.write("four")
    log.write("five")
    assert [(e["event"], e.get("lost", 0)) for e in entries(path)] == [("one", 0), ("four", 2), ("five", 0)]


def test_a_process_that_hangs_with_the_lock_does_not_hang_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_log, "PATIENCE", 0.05)
    log = EventLog(tmp_path / "audit.jsonl")
    with (tmp_path / "audit.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        log.write("left")
    log.write("left")
    assert [e.get("lost") for e in entries(tmp_path / "audit.jsonl")] == [1] and "gap" in caplog.text


def test_a_line_that_waited_while_a_new_file_was_begun_goes_to_that_one(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = EventLog(path)
    with path.open() as other, ThreadPoolExecutor(1) as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        waits = pool.submit(log.write, "left")
        time.sleep(0.05)
        path.rename(tmp_path / "audit.jsonl.1")
        fcntl.flock(other, fcntl.LOCK_UN)
        waits.result()
    assert not (tmp_path / "audit.jsonl.1").read_bytes() and [e["event"] for e in entries(path)] == ["left"]


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/audit\.jsonl cannot be written"):
        EventLog(tmp_path / "file" / "audit.jsonl")


def test_without_a_path_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    EventLog(None, side="client").write("left", what="update")
    assert not list(tmp_path.iterdir())


def test_what_comes_from_outside_cannot_pose_as_a_line_or_move_the_cursor(tmp_path: Path) -> None:
    EventLog(tmp_path / "audit.jsonl").write("refused", why='x"}\n{"at": 0}\x1b[2J\u202e\x00\ud800', at="never")
    text = (tmp_path / "audit.jsonl").read_text()
    assert text.count("\n") == 1 and text.rstrip("\n").isprintable()
    assert json.loads(text)["why"] == r'x"}\n{"at": 0}\x1b[2J\u202e\x00\ud800' and json.loads(text)["at"] != "never"


def test_what_is_too_long_is_cut_and_counted() -> None:
    assert sanitised("é" * 510) == "é" * 500 + "... and 10 more characters"
    cut = sanitised([*range(2003)])
    assert isinstance(cut, list) and cut[-2:] == [1999, "... and 3 more"]


def test_a_number_that_python_would_not_print_is_printed() -> None:
    assert sanitised(10**6000) == hex(10**6000)[:500] + f"... and {len(hex(10**6000)) - 500} more characters"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), values))
def test_whatever_is_written_is_one_line_of_strict_json(given: dict[str, object]) -> None:
    line = json.dumps(sanitised(given), ensure_ascii=False, allow_nan=False)
    assert line.isprintable() and sanitised(json.loads(line)) == json.loads(line)
    line.encode()
