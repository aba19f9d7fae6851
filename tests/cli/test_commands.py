"""The commands round a run: what they print, and how they end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from fedlora.cli.app import app
from fedlora.cli.settings_command import OFTEN
from fedlora.config import settings
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


def test_check_tells_a_program_what_came_of_every_check(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND.replace("return average(updates, weights)", "return state.A"))
    done = fedlora("check", "mine.py", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    last = told["strategies"]["Mine"][-1]
    assert done.returncode == 1 and told["passed"] is False and last["outcome"] == "failed" and last["detail"]


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


def test_one_strategy_is_shown_with_all_that_it_declares(tmp_path: Path) -> None:
    shown = fedlora("strategies", "FedEx-LoRA", cwd=tmp_path).stdout.splitlines()
    assert shown[0] == "name:     fedex_lora" and shown[-1] == "paper:    https://arxiv.org/abs/2410.09432"
    assert fedlora("strategies", "fedaxg", cwd=tmp_path).returncode == 1


def test_on_a_narrow_terminal_strategies_keep_their_names_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("COLUMNS", "80"), ("FORCE_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    shown = fedlora("strategies", cwd=tmp_path).stdout
    assert "fedmomentum" in shown and "https://" not in shown and "fedlora strategies NAME" in shown


def test_tables_are_json_for_a_program(tmp_path: Path) -> None:
    strategies = {row["name"]: row for row in json.loads(fedlora("strategies", "--json", cwd=tmp_path).stdout)}
    assert strategies["fedex_lora"]["exact"] is True and strategies["fedavg"]["kinds"] == ["lora", "dora", "vera"]
    settings = {row["key"]: row for row in json.loads(fedlora("settings", "--json", cwd=tmp_path).stdout)}
    assert settings["lora.rank"]["default"] == 8 and settings["dp.epsilon"]["default"] == "inf"
    assert settings["model.quantize"]["values"] == ["none", "8bit", "4bit"]


def test_settings_are_shown_by_section_on_lines_that_fit(tmp_path: Path) -> None:
    every = fedlora("settings", cwd=tmp_path).stdout.splitlines()
    train = fedlora("settings", "train", cwd=tmp_path).stdout.splitlines()
    assert max(map(len, every)) <= 100 and set(train) <= set(every)
    assert train[0] == "train: How a client trains; one definition for the settings file, the command line and the Job."
    assert not any(line.startswith(("lora.", "data.")) for line in train)
    shown = {line.split()[0] for line in every if line and not line.startswith(" ")}
    assert shown >= {setting.key for setting in settings()}


@pytest.mark.parametrize("words", [["train.lr"], ["train.batch-size"]])
def test_one_setting_can_be_looked_up(words: list[str], tmp_path: Path) -> None:
    shown = fedlora("settings", *words, cwd=tmp_path).stdout.splitlines()
    assert shown[2].startswith(words[0].replace("-", "_")) and len(shown) == 4


def test_a_section_that_there_is_not_is_refused_with_the_nearest(tmp_path: Path) -> None:
    refused = fedlora("settings", "trian", cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr == 'error: there is no section "trian"; did you mean "train"?\n'


def test_simulates_help_shows_the_settings_that_readme_and_quickstart_use() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text() + (root / "docs" / "quickstart.md").read_text()
    used = {key.replace("-", "_") for key in re.findall(r"--([a-z]+\.[a-z_-]+)", text)}
    assert used
    assert used <= set(OFTEN), f"show them in `fedlora simulate --help`: {used - set(OFTEN)}"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["simulate", "-h"], 0),
        (["strategies", "--nonsense"], 2),
        (["nonsense"], 2),
        (["export"], 2),
        (["export", "nowhere"], 1),
        (["simulate", "--rounds", "four"], 2),
        (["simulate", "--train.lr", "four"], 1),
    ],
)
def test_a_command_ends_with_the_code_that_is_documented(words: list[str], code: int, tmp_path: Path) -> None:
    done = fedlora(*words, cwd=tmp_path)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_a_client_is_told_of_an_unknown_setting_that_it_is_unknown(tmp_path: Path) -> None:
    given = ["client", "--state", "state", "--insecure", "--id", "0"]
    unknown = fedlora(*given, "--trian.lr", "1", cwd=tmp_path)
    servers = fedlora(*given, "--train.lr", "1", cwd=tmp_path)
    assert 'unknown key "trian.lr"; did you mean' in unknown.stderr
    assert "train.lr is the server's to set" in servers.stderr


def test_no_option_is_read_from_an_environment_variable() -> None:
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    assert not [p.name for command in commands for p in command.params if p.envvar]


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
    for client, own in again["each"].items():
        assert own == pytest.approx({name: lines[-1]["each"][client][name] for name in own}, rel=1e-5)


def test_options_of_lm_evals_tasks_are_refused_where_no_task_is_named(tmp_path: Path) -> None:
    refused = fedlora("evaluate", "run", "--limit", "3", cwd=tmp_path)
    assert refused.returncode == 1 and "--limit says how tasks of lm-eval are done" in refused.stderr


OPTIONS = {  # of every command: its options, an argument in capitals; !: required, *: may be given more than once
    "simulate": """--clients int>=1, --rounds int>=1, --cohort int>=1, --strategy text, --option* text, --model text,
        --data text, --eval-data text, --partition text, --engine text, --config path, --seed int, --dp-epsilon float,
        --dp-delta float, --dp-clip float, --dp-noise float, --dp-level text, --out path, --resume path, --json flag""",
    "compare": """FILE text, --out path, --strategies text, --seeds text, --grid* text, --tune* text, --against text,
        --lines text, --jobs int>=1, --show flag, --json flag, --markdown flag, --csv flag, --latex flag,
        --clients int>=1, --rounds int>=1, --cohort int>=1, --model text, --data text, --eval-data text,
        --partition text, --dp-epsilon float, --dp-delta float""",
    "plan": """--clients int>=1, --rounds int>=1, --cohort int>=1, --strategy text, --option* text, --model text,
        --data text, --eval-data text, --partition text, --engine text, --config path, --seed int, --dp-epsilon float,
        --dp-delta float, --dp-clip float, --dp-noise float, --dp-level text, --examples int>=0, --memory text,
        --json flag""",
    "doctor": """--credentials path, --server text, --state path, --id int>=0, --data text, --model text, --config path,
        --run path, --fingerprint text, --json flag""",
    "strategies": "NAME text, --json flag",
    "settings": "SECTION text, --json flag",
    "evaluate": """FOLDER! path, --eval-data text, --json flag, --tasks text, --include-path path, --limit int>=1,
        --num-fewshot int>=0, --apply-chat-template flag""",
    "check": "NAMES* text, --option* text, --json flag",
    "audit": """RUN text, --strategy text, --option* text, --model text, --dp-epsilon float, --dp-delta float,
        --dp-clip float, --dp-noise float, --dp-level text, --seed int, --repeat int>=1, --controls flag,
        --membership flag, --json flag""",
    "export": """FOLDER! path, --as text, --max-rank int>=0, --uniform-rank flag, --out path, --llama-cpp path,
        --base-model text, --push text, --public flag, --dry-run flag""",
    "reproduce": """NAME text, --out path, --jobs int>=1, --show flag, --json flag, --model text, --data text,
        --eval-data text""",
    "report": "FOLDERS*! path, --out path",
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
