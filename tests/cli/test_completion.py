"""What a shell offers on Tab, asked as bash asks."""

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from typer.main import get_command

from fedlora.cli.app import app
from fedlora.cli.completion import strategy_names
from fedlora.strategy import catalogue


def offered(*words: str) -> list[str]:
    """What the last of these words may become."""
    shell = ShellComplete(get_command(app), {}, "fedlora", "_FEDLORA_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["si"], ["simulate"]),
        (["simulate", "--eval"], ["--eval-data", "--eval.generate"]),
        (["simulate", "--strategy", "fedex"], ["fedex_lora"]),
        (["simulate", "--engine", "s"], ["serial", "stacked"]),
        (["simulate", "--partition", "d"], ["dirichlet:"]),
        (["simulate", "--train.sch"], ["--train.schedule"]),
        (["simulate", "--train.schedule", ""], ["constant", "linear", "cosine"]),
        (["simulate", "--model.class-order", "d"], ["data"]),
        (["simulate", "--lora.rslora", "t"], ["true"]),
        (["client", "--data.tem"], ["--data.template"]),
        (["check", "fedav"], ["fedavg"]),
        (["settings", "tr"], ["train"]),
    ],
)
def test_what_is_begun_is_completed(words: list[str], some: list[str]) -> None:
    assert set(some) <= set(offered(*words))


def test_nothing_is_offered_that_does_not_begin_so() -> None:
    assert all(word.startswith("--lora.r") for word in offered("simulate", "--lora.r"))


def test_the_strategies_that_are_offered_are_those_of_the_catalogue() -> None:
    assert strategy_names() == sorted(entry.name for entry in catalogue())


def test_a_shell_is_answered_without_torch() -> None:
    env = os.environ | {"_FEDLORA_COMPLETE": "complete_bash", "COMP_WORDS": "fedlora simulate --strategy f"}
    code = "import sys; sys.argv = ['fedlora']\nfrom fedlora.cli.app import app\n"
    code += "try: app(prog_name='fedlora')\nfinally: print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"COMP_CWORD": "3"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "False False" and "fedavg" in done.stdout.splitlines(), done.stderr
