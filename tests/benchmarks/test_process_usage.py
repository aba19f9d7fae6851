"""What a command costs: its children's CPU time is in it, and a command that fails says so."""

import subprocess
import sys

import pytest

from benchmarks.process_usage import busy_neighbours, machine, measure

BURN = "import time\nwhile time.process_time() < 0.8: pass"


def test_cpu_time_and_memory_of_a_process_that_a_command_starts_count() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}]); print('done')"
    usage, text = measure([sys.executable, "-c", parent], {}, 60)
    assert 0.5 < usage.cpu < 3 and usage.wall >= 0.8 and usage.peak > 5e6 and text == "done\n"


def test_a_command_that_fails_is_an_error_with_its_last_lines() -> None:
    with pytest.raises(RuntimeError, match="ended with 3: no such thing"):
        measure([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"], {}, 60)


def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        measure([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.5)


def test_neighbours_compute_within_the_block_and_are_gone_after_it() -> None:
    import psutil

    before = set(psutil.Process().children())
    with busy_neighbours(2):
        assert len(set(psutil.Process().children()) - before) == 2
    assert set(psutil.Process().children()) <= before


def test_the_machine_is_named_with_its_instructions() -> None:
    assert machine()["instructions"] and machine()["bf16 instructions"] in ("yes", "no")
