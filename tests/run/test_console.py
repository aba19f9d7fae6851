"""What a person sees: plain lines where nobody sits at a terminal, and who is there by name."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.jobs import Client
from fedlora.run.console import ConsoleProgress

ROOT = Path(__file__).parents[2]
WARNS = """
import logging
logging.basicConfig(format="%(asctime)s:%(levelname)s:%(message)s", datefmt="%m/%d/%Y")  # as a library may do
from fedlora.run.console import show_log
show_log(with_times={with_times})
logging.getLogger("fedlora").warning("client 0 failed")
"""


@pytest.fixture
def screen() -> ConsoleProgress:
    made = ConsoleProgress(Console(file=StringIO(), highlight=False, soft_wrap=True))
    made.names = {0: "hospital-a", 1: "hospital-b", 2: "hospital-c"}
    return made


def said(screen: ConsoleProgress) -> str:
    file = screen._console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


def warned(with_times: bool) -> str:
    code = WARNS.format(with_times=with_times)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stderr


def test_who_comes_and_who_is_gone_on_without_is_said_by_name(screen: ConsoleProgress) -> None:
    screen.joined(Client(0, 1200, 8))
    screen.begins_without([1, 2])
    screen.begins_without([])
    assert said(screen).splitlines() == [
        "hospital-a is here, with 1,200 examples",
        "going on without hospital-b, hospital-c, who may join later",
    ]


def test_warnings_have_no_format_of_a_librarys() -> None:
    assert warned(with_times=False) == "client 0 failed\n"


def test_a_log_has_its_times_in_utc() -> None:
    time, _, words = warned(with_times=True).partition(" ")
    assert time.endswith("Z") and time[10] == "T" and words == "client 0 failed\n"


def test_a_log_has_no_movements_of_a_cursor_whatever_the_environment_says(tmp_path: Path) -> None:
    """FORCE_COLOR is set by many a container and CI; rich then takes a file for a terminal."""
    data = "".join(json.dumps({"text": f"w{i} x y z"}) + "\n" for i in range(8))
    (tmp_path / "a.jsonl").write_text(data)
    words = ["--data", "a.jsonl", "--clients", "2", "--rounds", "1", "--train.steps", "1", "--out", "run"]
    command = [sys.executable, "-m", "fedlora", "simulate", "--model", str(ROOT / "fedlora" / "tiny"), *words]
    env = os.environ | {"FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "round" in done.stdout


def test_columns_are_two_spaces_apart_whatever_stands_in_them(screen: ConsoleProgress) -> None:
    screen._columns = ["round", "train loss", "evaluation", "worst client", "off the mean"]
    screen._rounds = 1000
    screen._say_row({name: name for name in screen._columns})
    screen._say_row(
        {
            "round": "1000/1000",
            "train loss": "5.9522",
            "evaluation": "perplexity 9.645e+04",
            "worst client": "9.645e+04",
            "off the mean": "1.2e-03",
        }
    )
    rows = [re.split(r" {2,}", line.strip()) for line in said(screen).splitlines()]
    assert rows[0] == screen._columns and rows[1][:3] == ["1000/1000", "5.9522", "perplexity 9.645e+04"]
