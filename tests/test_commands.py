"""The commands round a run: what they print, and how they end."""

import json
from pathlib import Path

import pytest

from tests.models import make
from tests.test_simulate import fedlora

SOUND = '''
from dataclasses import dataclass
from fedlora.lora import average
from fedlora.strategy import Job, Strategy

@dataclass(frozen=True)
class Mine(Strategy):
    """Mine: the mean. https://example.org"""
    exact = False
    sums_only = True
    continues = True
    def init(self, lora): return lora
    def client_init(self, state, client): return Job(start=state)
    def aggregate(self, state, updates, weights): return average(updates, weights)
    def adapter(self, state): return state
'''


def test_check_passes_a_sound_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND)
    done = fedlora("check", "mine.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "0 failed" in done.stdout and "says whether the new model is" in done.stdout


def test_check_says_what_is_not_so_and_fails(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND.replace("exact = False", "exact = True"))
    done = fedlora("check", "mine.py", cwd=tmp_path)
    assert done.returncode == 1 and "exact" in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["no_such", "nowhere.py", "fedlora.lora:LoRA"])
def test_check_of_what_is_none_is_one_sentence(name: str, tmp_path: Path) -> None:
    done = fedlora("check", name, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_strategies_shows_what_each_declares(tmp_path: Path) -> None:
    shown = fedlora("strategies", cwd=tmp_path).stdout
    assert "fedex_lora" in shown and "K * r * (d_in + d_out)" in shown and "https://arxiv.org/abs/2410.09432" in shown


def test_a_run_measures_exactness_and_evaluate_knows_what_clients_keep(tmp_path: Path) -> None:
    rows = [{"text": f"w{i % 7} w{i % 5} w{i % 3}", "label": str(i % 3)} for i in range(120)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = ["--model", str(make("bert", tmp_path / "bert")), "--data", "data.jsonl", "--clients", "3", "--cohort", "3"]
    short = ["--rounds", "2", "--train.steps", "4", "--train.lr", "0.05", "--data.holdout", "0.3", "--exactness"]
    exact = fedlora("simulate", *run, *short, "--strategy", "fedex_lora", "--out", "exact", cwd=tmp_path)
    assert exact.returncode == 0, exact.stderr
    assert "off the mean" in exact.stdout and "every round's model was the weighted mean" in exact.stdout
    own = fedlora("simulate", *run, *short, "--strategy", "fedsa_lora", "--out", "own", cwd=tmp_path)
    assert "no common model" in own.stdout
    lines = [json.loads(line) for line in (tmp_path / "own" / "rounds.jsonl").read_text().splitlines()]
    assert "exactness" not in lines[-1]
    again = json.loads(fedlora("evaluate", "own", "--json", cwd=tmp_path).stdout.splitlines()[-1])
    assert again["clients"] == lines[-1]["eval_clients"]
