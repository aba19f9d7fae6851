"""Every command in a shell block of README and the documents runs, or is named below with the reason why not here.

Each document's commands run in their order in a folder of small files and models (`tests/support/documents.py`). A run
is cut down to one round of one step for three clients; nothing else is changed.
"""

import doctest
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, rmtree

import click
import peft
import pytest
from typer.main import get_command

from fedlora import config as configuration
from fedlora.cli.app import app
from fedlora.cli.options import dotted
from fedlora.comparison.settings import comparison
from fedlora.comparison.settings import read as comparison_settings
from tests.cli.test_simulate import fedlora
from tests.support.documents import ROOT, block, write_folder

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
SMALL = "--rounds 1 --train.steps 1 --train.batch_size 2 --model.max_length 16 --lora.rank 4 --eval.max_new_tokens 4"
SMALL_DATA = "--data train.jsonl --model my-bert"  # where a command names none, instead of those that come with fedlora
ALIKE = {"--personal.steps": 1, "--dp-epsilon": 8}  # where they are given: few steps, and one noise to compute for all
NOT_RUN = {  # by the beginning of a command, as a regular expression: why it is not run here, and what runs it instead
    r"fedlora (server|client)\b": "asks for processes that wait for each other: tests/deploy/ has them run",
    r"fedlora --(install|show)-completion": "is about the shell of a person: tests/cli/test_completion.py asks it",
    r"fedlora check( my_name)?$": "checks every strategy, for minutes: tests/checks/ does; my_name is nobody's",
    r"fedlora doctor": "looks at a site's keys and its server: tests/doctor/ has both",
    r"fedlora plan": "takes half a minute of steps on the embedded model: tests/estimates/ runs it on smaller ones",
    r"fedlora compare": "trains many models in processes of their own: tests/comparison/test_command.py does, small",
    r"fedlora reproduce \S": "trains for hours: tests/reproductions/ has the verdicts, tests/comparison/ small runs",
    r"fedlora audit": "takes from ten seconds to hours: tests/audit/ runs its measurements",
    r"fedlora simulate .*--engine flower": "needs Ray, GPUs or a cluster: tests/simulations/test_flower.py runs it",
    r"fedlora export .*--as gguf|python llama.cpp/|llama-cli": "needs llama.cpp: tests/run/test_gguf.py has a stand-in",
    r"fedlora export .*--push (?!.*--dry-run)|vllm|curl": "asks the hub, or a server: tests/run/test_hub.py has a hub",
    r"fedlora simulate .*--report-to \S+,": "needs the trackers' libraries: make test-trackers has them",
    r"fedlora evaluate .*--tasks": "needs lm-eval and its tasks from the hub",
    r"(OMP_\S+ )?python -m benchmarks\.": "measures for minutes to hours: tests/benchmarks/ runs most of them, small",
    r"bash benchmarks/gpu.sh": "needs a GPU",
    r"(FEDLORA_\S+ )*docker": "needs Docker: tests/deploy/compose.py runs the files",
    r"python -m tests\.support\.matrix": "takes minutes: tests/privacy/test_matrix.py asks a part of it",
    r"pip install": "needs a package index: the Makefile installs the same",
    r"make ": "runs the Makefile: `make test` runs this test and `make docs`; what `make simulate` runs is run here",
    r"flwr run": "leaves a SuperLink running: tests/deploy/test_flower_app.py has what it loads and builds",
    r"tensorboard": "serves until it is stopped",
    r"\.ci/run|\.venv/bin/python -m pytest": "runs the tests, this one too",
}


def commands(document: Path) -> Iterator[str]:
    """The lines of the document's shell blocks, without comments; a line that ends in a backslash goes on."""
    page = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    ((?:make|flwr) .*)$", page, re.MULTILINE)
    for line in "\n".join([*blocks, *indented]).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


def reason(command: str) -> str:
    """Why the command is not run here; empty where it is."""
    plain = " ".join(shlex.split(command))
    return next((why for beginning, why in NOT_RUN.items() if re.match(beginning, plain)), "")


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]
RUN: dict[Path, list[str]] = {document: [] for document in DOCUMENTS}  # each once, but where it goes on with a run
for found, command in ALL:
    if not reason(command) and ("runs/" in command or all(command not in some for some in RUN.values())):
        RUN[found].append(command)
MODULES = {module for _, c in ALL for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", c)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents name, with a run that has ended by two names."""
    at = tmp_path_factory.mktemp("documents")
    write_folder(at)
    words = shlex.split(f"simulate --model my-model --data 'sites/*.jsonl' --data.holdout 0.1 --out runs/mine {SMALL}")
    made = fedlora(*words, cwd=at)
    assert made.returncode == 0, made.stderr
    copytree(at / "runs" / "mine", at / "runs" / "first")
    return at


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if RUN[d]], ids=lambda d: d.name)
def test_every_command_of_a_document_runs(document: Path, folder: Path, tmp_path: Path) -> None:
    at = copytree(folder, tmp_path / "work")
    for command in dict.fromkeys(RUN[document]):
        words = shlex.split(command)[1:]
        if "--out" in words:
            rmtree(at / words[words.index("--out") + 1], ignore_errors=True)
        done = fedlora(*cut_down(words), cwd=at)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def cut_down(words: list[str]) -> list[str]:
    """The command, a run's size made small; one that is resumed has one more round."""
    if words[0] != "simulate":
        return words
    if "--resume" in words:
        return [*words, "--rounds", "2", "--threads", "1"]
    data = "" if {"--data", "--config"} & set(words) else SMALL_DATA
    cohort = "" if "--cohort" in words else "--cohort 3"
    same = " ".join(f"{option} {value}" for option, value in ALIKE.items() if option in words)
    return [*words, *f"{data} {cohort} {same} {SMALL} --threads 1".split()]


@pytest.mark.parametrize("command", sorted({c for _, c in ALL if "fedlora " in c and "-completion" not in c}))
def test_the_options_that_a_command_names_exist(command: str) -> None:
    """Of those that are not run too: each option is the command's, or a setting with a value that it may have."""
    words = shlex.split(command)
    words = words[words.index("fedlora") + 1 :]
    group = get_command(app)
    assert isinstance(group, click.Group)
    context = group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=True)
    first = [
        value for value in context.params.values() if str(value).startswith("--")
    ]  # where an argument was left out
    configuration.build(dotted([*first, *context.args]))


def test_all_that_is_not_run_is_named_and_nothing_else_is() -> None:
    plain = [" ".join(shlex.split(c)) for _, c in ALL]
    assert not [beginning for beginning in NOT_RUN if not any(re.match(beginning, c) for c in plain)]
    assert not [c for _, c in ALL if not reason(c) and not c.startswith("fedlora ")]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_that_is_started_by_its_name_is_there(module: str) -> None:
    assert find_spec(module) is not None


def test_the_strategy_that_is_written_step_by_step_gives_what_its_page_says(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        with chdir(folder):
            found = doctest.testfile(str(ROOT / "docs" / "own-strategy.md"), module_relative=False)
    finally:
        sys.path.remove(str(folder))
    assert found.attempted > 5 and found.failed == 0


def test_the_adapter_loads_as_the_quickstart_says(folder: Path) -> None:
    names: dict[str, object] = {}
    with chdir(folder):
        exec(compile(block("quickstart.md", "python"), "docs/quickstart.md", "exec"), names)
    assert isinstance(names["model"], peft.PeftModel)


def test_the_comparison_in_the_guide_for_research_is_one(folder: Path) -> None:
    with chdir(folder):
        made = comparison(comparison_settings(Path("study.toml")), {}, Path())
    assert {"alone", "pooled", "fedavg", "ravan of rank 8"} <= {line.name for line in made.lines}


def test_the_limits_of_a_party_in_its_guide_are_settings_of_a_client(folder: Path) -> None:
    given = configuration.read(folder / "limits.toml")
    assert given and all(key.startswith(configuration.CLIENT_SECTIONS) for key in given)
    configuration.build(given)
