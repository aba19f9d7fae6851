"""The commands round a run: what they print, and how they end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from fedlora.cli.app import app
from tests.cli.test_simulate import fedlora
from tests.support.models import make

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


def test_options_of_lm_evals_tasks_are_refused_where_no_task_is_named(tmp_path: Path) -> None:
    refused = fedlora("evaluate", "run", "--limit", "3", cwd=tmp_path)
    assert refused.returncode == 1 and "--limit says how tasks of lm-eval are done" in refused.stderr


OPTIONS = {  # of every command: its options, an argument in capitals; !: required, *: may be given more than once
    "simulate": """--clients int>=1, --rounds int>=1, --cohort int>=1, --strategy text, --option* text, --model text,
        --data text, --eval-data text, --partition text, --engine text, --config path, --seed int, --dp-epsilon float,
        --dp-delta float, --dp-clip float, --dp-noise float, --dp-level text, --out path, --resume path""",
    "strategies": "",
    "settings": "",
    "evaluate": """FOLDER! path, --eval-data text, --json flag, --tasks text, --include-path path, --limit int>=1,
        --num-fewshot int>=0, --apply-chat-template flag""",
    "check": "NAMES* text, --option* text",
    "audit": """RUN text, --strategy text, --option* text, --model text, --dp-epsilon float, --dp-delta float,
        --dp-clip float, --dp-noise float, --dp-level text, --seed int, --repeat int>=1, --controls flag,
        --membership flag, --json flag""",
    "export": "FOLDER! path, --as text, --max-rank int>=0, --out path",
    "provision": """--out! path, --host* text, --port int>=0, --clients int>=0, --client* text, --remove text,
        --days int, --renew flag, --client-certificates flag""",
    "server": """--out! path, --credentials path, --insecure flag, --config path, --clients int>=1, --rounds int>=1,
        --cohort int>=1, --strategy text, --option* text, --model text, --eval-data text, --seed int, --host text,
        --port int, --superlink text, --metrics-port int>=0, --metrics-host text""",
    "client": """--state! path, --server text, --credentials path, --insecure flag, --id int>=0, --data text,
        --model text, --config path, --worker path, --cold flag""",
    "worker": """--socket! path, --state path, --credentials path, --id int>=0, --data text, --model text,
        --config path, --told path""",
}


def described(parameter: Any) -> str:
    """An option or argument of a command, as `OPTIONS` has it."""
    name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
    marks = ("*" if parameter.nargs == -1 or getattr(parameter, "multiple", False) else "") + "!" * parameter.required
    kind = {"STRING": "text", "INT": "int", "FLOAT": "float", "BOOL": "flag"}.get(str(parameter.type), "path")
    least = getattr(parameter.type, "min", None)
    return f"{name}{marks} {kind if least is None else f'int>={least}'}"


def test_every_command_has_the_options_it_is_known_for() -> None:
    """What scripts and documents of others rest on: an option may come, and none may go or take another type."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == list(OPTIONS)
    for name, command in commands.items():
        known = {" ".join(word.split()) for word in OPTIONS[name].split(",") if word.strip()}
        assert {described(p) for p in command.params} == known, name


@pytest.mark.parametrize("command", OPTIONS)
def test_help_says_what_every_option_means(command: str) -> None:
    options = [p for p in get_command(app).commands[command].params if p.opts[0].startswith("-")]  # type: ignore[attr-defined]
    for option in options:
        assert option.help and option.help[0].isupper() and option.help.endswith("."), option.name


def test_a_command_shows_its_help_without_torch() -> None:
    code = "import sys; from fedlora.cli.app import app; app(['simulate', '--help'], standalone_mode=False)"
    code += "; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("False False\n") and "--partition" in said
