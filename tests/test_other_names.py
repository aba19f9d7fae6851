"""What other programs call a setting, and that each is a setting here."""

import re

import pytest
from typer.main import get_command

from fedlora.cli.app import app
from fedlora.config import build, settings
from fedlora.errors import ConfigError, StrategyError
from fedlora.other_names import HERE, STRATEGIES, ours
from fedlora.strategy import load


@pytest.mark.parametrize("name", HERE)
def test_what_another_program_calls_a_setting_is_one_here(name: str) -> None:
    options = {p.opts[0] for p in get_command(app).commands["simulate"].params}  # type: ignore[attr-defined]
    key, value = re.match(r"([\w.-]+)(?: = (\w+))?", HERE[name]).groups()  # type: ignore[union-attr]
    assert key in options | {s.key for s in settings()}
    if value:
        build({key: value})


def test_no_name_of_another_program_is_a_key_of_ours() -> None:
    assert not {s.key for s in settings()} & HERE.keys()


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("per_device_train_batch_size", "train.batch_size"),
        ("num-server-rounds", "rounds"),
        ("model.lora.peft-lora-r", "lora.rank"),
        ("train.training-arguments.num-train-epochs", "train.epochs, of a round"),
        ("options.backend.client-resources.num-cpus", "threads"),
        ("Lora_R", "lora.rank"),
        ("algorithm", "strategy"),
        ("mu", "train.prox"),
        ("dirichlet-alpha", "data.partition, as dirichlet:0.5"),
        ("something", ""),
    ],
)
def test_their_sections_hyphens_and_capitals_do_not_matter(name: str, here: str) -> None:
    assert ours(name) == here


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_of_other_libraries_that_is_a_setting_here_is_refused_with_it(name: str) -> None:
    with pytest.raises(StrategyError) as error:
        load(name.upper())
    key, _, value = str(error.value).rpartition(": ")[2].partition(" = ")
    build({key: value or "0.1"})


def test_a_key_that_is_like_none_is_refused_with_the_command_that_lists_them() -> None:
    with pytest.raises(ConfigError, match=r'unknown key "zzz"; fedlora settings lists those that are known$'):
        build({"zzz": 1})
