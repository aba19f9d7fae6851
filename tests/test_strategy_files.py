"""A strategy by the path of its file, as `fedlora check` and `fedlora simulate` take it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fedlora import config as configuration
from fedlora.api import new_run
from fedlora.errors import StrategyError
from fedlora.lora import LoRA
from fedlora.storage import checkpoint
from fedlora.strategy import find, load
from fedlora.strategy_files import absolute, path_and_name, spec_of

MINE = """
from dataclasses import dataclass
from typing import NamedTuple
from fedlora.lora import LoRA, average
from fedlora.strategy import Job, Strategy

class State(NamedTuple):
    lora: LoRA
    round: int

@dataclass(frozen=True)
class {name}(Strategy):
    lam: float = {lam}
    sums_only = continues = True

    def init(self, lora): return State(lora, 0)
    def client_init(self, state, client): return Job(start=state.lora)
    def aggregate(self, state, updates, weights): return State(average(updates, weights), state.round + 1)
    def adapter(self, state): return state.lora
"""


def written(folder: Path, name: str = "Mine", lam: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(MINE.format(name=name, lam=lam))
    return path


def test_a_file_of_one_strategy_is_that_strategy_with_its_options(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert repr(load(str(path), lam="0.5")) == "Mine(lam=0.5)"
    assert find(f"{path}:Mine") is find(str(path))


def test_of_a_file_of_several_one_is_to_be_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text() + MINE.format(name="Other", lam=2.0))
    with pytest.raises(StrategyError, match=r"defines 2 strategies .*mine\.py:Mine, .*mine\.py:Other"):
        load(str(path))
    assert repr(load(f"{path}:Other")) == "Other(lam=2.0)"


def test_a_file_that_changed_is_read_again_and_one_of_the_same_name_is_another(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", lam=1.0), written(tmp_path / "b", lam=2.0)
    assert [repr(load(str(path))) for path in (first, second, first)] == ["Mine(lam=1.0)", "Mine(lam=2.0)"] * 1 + [
        "Mine(lam=1.0)"
    ]
    first.write_text(MINE.format(name="Mine", lam=3.25))
    assert repr(load(str(first))) == "Mine(lam=3.25)"


def test_a_strategy_imported_by_the_file_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from fedlora.strategies.fedavg import FedAvg\n")
    with pytest.raises(StrategyError, match="defines no strategy"):
        load(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("spec", ["fedavg", "my_lab.mine:Mine", "flwr:FedAdam", "mine.pyc", ""])
def test_what_names_no_file_is_left_as_it_is(spec: str) -> None:
    assert path_and_name(spec) is None and absolute(spec) == spec


def test_a_run_keeps_the_file_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    kept = configuration.absolute(configuration.build({"strategy": "mine.py:Mine"}))
    assert kept.strategy == f"{tmp_path / 'mine.py'}:Mine"


def test_a_state_of_the_file_is_read_back_by_another_process(tmp_path: Path) -> None:
    spec = str(written(tmp_path))
    state = load(spec).init(LoRA({"m": torch.ones(2, 3)}))
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, state, {}))
    del sys.modules[type(state).__module__]  # as in a process that has just begun
    load(spec)
    found = checkpoint.latest(tmp_path)
    assert found is not None and type(found.state).__name__ == "State" and found.state.lora.A["m"].shape == (2, 3)


def test_the_default_run_directory_has_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder, _ = new_run({}, {"strategy": "mine.py"}, None)
    assert folder.path.parent == Path("runs") and folder.path.name.endswith("-mine")


@dataclass(frozen=True)
class Here:
    """A class of a module that is found by its name."""


def test_a_class_of_a_file_is_named_by_its_file_and_others_by_their_module(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert spec_of(find(str(path))) == f"{path}:Mine"
    assert spec_of(Here) == f"{__name__}:Here"
