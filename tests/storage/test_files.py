"""Files hold the old content or the new, lines are whole or absent, and one process at a time has a lock."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.errors import CheckpointError, ConfigError
from fedlora.storage.files import append_durably, hold_lock, only_writer, replace_file, write_durably


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """The limit on a file's size stands in for the full disk: the kernel refuses the write in the same place."""
    was, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_is_replaced_in_folders_that_are_made(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_durably(tmp_path / "a" / "b" / "file", content)
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")
    with room_for(10), pytest.raises(CheckpointError, match=r"file \(0\.0 MB\) could not be written: .*: make room"):
        write_durably(tmp_path / "file", b"new" * 10)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_has_the_mode_that_was_asked_for(tmp_path: Path, mode: int) -> None:
    was = os.umask(0)
    try:
        replace_file(tmp_path / "file", b"", mode=mode)
    finally:
        os.umask(was)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_line_is_added_after_one_that_a_crash_cut_short(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"one\ntw")
    append_durably(tmp_path / "lines", b"three\n")
    assert (tmp_path / "lines").read_bytes() == b"one\ntw\nthree\n"


def test_of_a_line_without_room_nothing_is_written(tmp_path: Path) -> None:
    append_durably(tmp_path / "lines", b"one\n")
    with room_for(8), pytest.raises(OSError, match="No space left"):
        append_durably(tmp_path / "lines", b"two and three\n")
    assert (tmp_path / "lines").read_bytes() == b"one\n"


def test_a_lock_is_refused_while_another_process_holds_it(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fedlora.storage.files import hold_lock\n"
    code += "with hold_lock(Path(sys.argv[1]), wait=False): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match="another fedlora is at work in"),
            hold_lock(tmp_path / "lock", wait=False),
        ):
            pass
        other.kill()
    with hold_lock(tmp_path / "lock", wait=False):
        pass


def test_a_folder_has_one_writer_and_is_gone_again_where_nothing_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    refused = pytest.raises(ConfigError, match="another fedlora is at work in")
    with only_writer(folder), refused, only_writer(folder):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with only_writer(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    with only_writer(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "file").exists()


def test_a_place_where_no_lock_can_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match=r"lock cannot be locked: .*; remove it"), only_writer(tmp_path):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file cannot be made: .*; choose another folder"),
        only_writer(tmp_path / "file"),
    ):
        pass


def test_a_folder_in_a_files_place_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(CheckpointError, match=r"Is a directory; what was there is untouched: remove that folder"):
        write_durably(tmp_path / "file", b"new")
