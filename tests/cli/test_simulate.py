"""`fedlora simulate`, as a person runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.cli.app import main
from tests.support.files import open_to_others
from tests.support.forked import Forked
from tests.support.models import make

ROOT = Path(__file__).parents[2]
SMALL = ["--train.batch_size", "4", "--train.lr", "0.01", "--lora.rank", "3", "--model.max_length", "16"]
SMALL += ["--threads", "1"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def fedlora(*words: str | Path, cwd: Path | None = None) -> Done:
    """The command, in this process: what it says and how it ends, without the seconds that importing torch takes."""
    was, mask = sys.argv, os.umask(0o022)  # that of most machines
    out, err, code = StringIO(), StringIO(), 0
    sys.argv = ["fedlora", *map(str, words)]
    with chdir(cwd or Path.cwd()), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        finally:
            sys.argv = was
            os.umask(mask)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.path.remove(str(cwd or Path.cwd()))
    return Done(code, out.getvalue(), err.getvalue())


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a training file of 60 lines and an evaluation file of 20."""
    folder = tmp_path_factory.mktemp("site")
    make("bert", folder / "model")
    for name, n in (("train.jsonl", 60), ("test.jsonl", 20)):
        rows = [{"text": f"w{i % 7} w{i % 5}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(n)]
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def given(site: Path) -> list[str]:
    files = ["--model", site / "model", "--data", site / "train.jsonl", "--eval-data", site / "test.jsonl"]
    return [*map(str, files), "--clients", "6", "--cohort", "3", "--rounds", "4", *SMALL]


@pytest.fixture(scope="module")
def whole(given: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = fedlora("simulate", *given, "--data.holdout", "0.2", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_what_it_promises(whole: tuple[Path, str]) -> None:
    out, said = whole
    rows = records(out)
    keys = {"round", "clients", "answered", "train_loss", "eval", "bytes_up", "bytes_down", "seconds"}
    assert [r["round"] for r in rows] == [1, 2, 3, 4] and all(keys <= r.keys() for r in rows)
    assert all(r["clients"] == r["answered"] == 3 and r["bytes_up"] > 0 for r in rows)
    assert set(rows[0]["eval"]) == {"loss", "accuracy", "macro_f1"} and rows[0]["eval_clients"]["clients"] == 6
    assert {"config.toml", "rounds.jsonl", "adapter", "checkpoint", "tensorboard"} <= {p.name for p in out.iterdir()}
    assert list((out / "tensorboard").iterdir()) and (out / "adapter" / "adapter_config.json").exists()
    assert "accuracy: " in said and f"adapter: {out}/adapter" in said and "4/4" in said


def test_what_a_run_writes_its_user_alone_can_read(whole: tuple[Path, str]) -> None:
    assert open_to_others(whole[0]) == []


def test_its_config_makes_the_same_run_again(whole: tuple[Path, str], tmp_path: Path) -> None:
    done = fedlora("simulate", "--config", whole[0] / "config.toml", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert same(whole[0], tmp_path / "again")


def test_evaluate_gives_what_the_last_round_gave(whole: tuple[Path, str]) -> None:
    got = json.loads(fedlora("evaluate", whole[0], "--json").stdout)
    assert got["after"] == pytest.approx(records(whole[0])[-1]["eval"], rel=1e-5)
    assert got["before"] == pytest.approx(records(whole[0])[0]["before"], rel=1e-5)


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_killed_run_goes_on_to_the_same_adapter(
    whole: tuple[Path, str], given: list[str], rounds: int, tmp_path: Path
) -> None:
    """kill -9 after so many rounds, at whatever moment of the next; the end is the same, bit for bit."""
    out = tmp_path / "killed"
    process = Forked("simulate", *given, "--data.holdout", "0.2", "--out", out)
    begun = out / (f"checkpoint/round-{rounds:06d}.safetensors" if rounds else "config.toml")
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "adapter").exists()
    done = fedlora("simulate", "--resume", out)
    assert done.returncode == 0, done.stderr
    assert same(whole[0], out) and [r["round"] for r in records(out)] == [1, 2, 3, 4]


def test_a_line_torn_by_a_crash_is_mended(whole: tuple[Path, str], tmp_path: Path) -> None:
    """The crash came after the checkpoint and in the middle of the line about it."""
    import shutil

    out = tmp_path / "torn"
    shutil.copytree(whole[0], out)
    text = (out / "rounds.jsonl").read_text()
    (out / "rounds.jsonl").write_text(text[: text.rindex("{") + 9])
    assert fedlora("simulate", "--resume", out).returncode == 0
    assert (out / "rounds.jsonl").read_text() == text


def test_a_finished_run_can_be_given_more_rounds(whole: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(whole[0], tmp_path / "more")
    assert fedlora("simulate", "--resume", tmp_path / "more", "--rounds", "5").returncode == 0
    assert [r["round"] for r in records(tmp_path / "more")] == [1, 2, 3, 4, 5]
    assert "rounds = 5" in (tmp_path / "more" / "config.toml").read_text()


def test_a_command_under_nohup_goes_on_when_its_terminal_is_gone() -> None:
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv = ['fedlora', '--help']\n"
    code += "from fedlora.cli.app import main\ntry: main()\nfinally: print(signal.getsignal(signal.SIGHUP).name)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.endswith(
        "SIG_IGN\n"
    )


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_it_keeps_what_it_has_and_says_how_to_go_on(
    by: signal.Signals, given: list[str], tmp_path: Path
) -> None:
    if signal.getsignal(by) is signal.SIG_IGN:
        pytest.skip(f"whoever started these tests has {by.name} ignored, as nohup does, and so does a run")
    out = tmp_path / "run"
    process = Forked("simulate", *given, "--out", out, "--rounds", "500")
    while not (out / "checkpoint" / "round-000002.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(by)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {out}" in said and "Traceback" not in errors
    assert (out / "adapter" / "adapter_model.safetensors").exists()


MINE = '''
"""Mine: uniform mean of B alone, with a pull towards zero."""
from dataclasses import dataclass
from fedlora.lora import LoRA, average
from fedlora.strategy import Job, Strategy

@dataclass(frozen=True)
class Pulled(Strategy[LoRA]):
    pull: float = 0.0
    def init(self, lora): return lora
    def client_init(self, state, client): return Job(start=state, trains="BH", shares="BH")
    def aggregate(self, state, updates, weights):
        mean = average(updates, [1.0] * len(updates))
        return LoRA(B={m: (1 - self.pull) * b for m, b in mean.B.items()}, H=mean.H).over(state)
    def adapter(self, state): return state
'''


def test_a_strategy_of_ones_own_runs_by_dotted_path(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "mine.py").write_text(MINE)
    mine = ["--strategy", "my_lab.mine:Pulled", "--option", "pull=1"]
    done = fedlora("simulate", *given, *mine, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    delivered = adapter(tmp_path / "run")
    assert all(not t.any() for name, t in delivered.items() if "lora_B" in name)
    assert 'strategy = "my_lab.mine:Pulled"' in (tmp_path / "run" / "config.toml").read_text()


def test_a_strategy_can_come_by_entry_point(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (tmp_path / "mine-1.0.dist-info" / "entry_points.txt").write_text("[fedlora.strategies]\npulled = mine:Pulled\n")
    listed = fedlora("strategies", cwd=tmp_path).stdout
    assert "pulled" in listed and "pull=0.0" in listed and "FedEx-LoRA" in listed
    once = [*given, "--strategy", "pulled", "--rounds", "1", "--out", "run"]
    assert fedlora("simulate", *once, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.text", "txt"], 'did you mean "text"'),
        (["--clients", "61", "--cohort", "3"], "61"),
        (["--cohort", "7"], "cohort = 7 is more than the 6 clients"),
        (["--lora.rank", "25"], "lora.rank = 25 is above the smaller dimension"),
        (["--strategy", "fedaxg"], 'did you mean "fedavg"'),
        (["--option", "lam=1"], 'has no option "lam"'),
        (["--lora.rnk", "4"], 'did you mean "lora.rank"'),
        (["--model", "no-such/model"], "no-such/model"),
        (["--train.lr", "1e30", "--train.clip", "0"], "train.lr"),
    ],
)
def test_a_mistake_is_one_sentence(given: list[str], words: list[str], says: str, tmp_path: Path) -> None:
    done = fedlora("simulate", *given, *words, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and says in "\n".join(errors), done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr
    if "1e30" not in words:  # which is no refusal: its clients have trained
        assert not list(tmp_path.iterdir()), "a refused run leaves a folder behind"


@pytest.mark.parametrize(
    "words",
    [
        ["--lora.ranks", "2,3", "--lora.rank", "3"],
        ["--aggregate.robust", "krum", "--dp-noise", "1", "--dp-level", "client"],
        ["--lora.ranks", "uniform:1-3", "--seed", "1"],
        ["--exactness", "--lora.kind", "dora"],
        ["--dp-epsilon", "1e-9"],
    ],
)
def test_a_refused_run_leaves_what_lay_in_its_folder_and_nothing_else(
    given: list[str], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    done = fedlora("simulate", *given, *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 1 and "error: " in done.stderr
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != "lock") == ["notes.txt"]


@pytest.mark.parametrize("words", [["--lora.ranks", "2,3"], ["--aggregate.robust", "krum", "--secure.aggregation"]])
def test_what_the_settings_alone_tell_is_refused_before_model_and_data_are_loaded(
    given: list[str], words: list[str], tmp_path: Path
) -> None:
    done = fedlora("simulate", *given, *words, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.iterdir())


def test_a_run_is_told_to_a_program_as_json(given: list[str], tmp_path: Path) -> None:
    words = ["--rounds", "1", "--train.batch-size", "8", "--eval_data", given[5], "--out", "run", "--json"]
    done = fedlora("simulate", *given, *words, cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["folder"] == "run" and told["rounds"] == records(tmp_path / "run") and "1/1" in done.stderr
    assert "batch_size = 8" in (tmp_path / "run" / "config.toml").read_text()


def test_a_resumed_run_keeps_the_settings_its_rounds_rest_on(whole: tuple[Path, str], tmp_path: Path) -> None:
    done = fedlora("simulate", "--resume", whole[0], "--train.lr", "1")
    assert done.returncode == 1 and "train.lr cannot change in a run that is resumed" in done.stderr
    done = fedlora("simulate", "--resume", tmp_path)
    assert done.returncode == 1 and f"{tmp_path} is no run directory" in done.stderr


def test_a_broken_line_is_named_with_its_number(given: list[str], site: Path, tmp_path: Path) -> None:
    lines = (site / "train.jsonl").read_text().splitlines()
    lines[16] = lines[16][:-5]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    done = fedlora("simulate", *given, "--data", "bad.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and "bad.jsonl line 17" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_holds_a_run_is_not_written_over(given: list[str], whole: tuple[Path, str]) -> None:
    before = (whole[0] / "rounds.jsonl").read_bytes()
    done = fedlora("simulate", *given, "--out", whole[0])
    assert done.returncode == 1 and "holds a run already" in done.stderr
    assert (whole[0] / "rounds.jsonl").read_bytes() == before


def test_help_lists_the_commands_quickly() -> None:
    command, env = [sys.executable, "-m", "fedlora", "--help"], os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, capture_output=True, check=True)
    began = time.monotonic()
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert all(word in said for word in ("simulate", "strategies", "evaluate", "settings"))
    assert time.monotonic() - began < 2  # half a second on an idle machine; tests share theirs
