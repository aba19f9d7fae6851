"""The run over all strategies: which runs are left to do, which rate is taken, what the table shows."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.sst2_all import GRID, Place, Variant, best_rate, load, ready, save, table, variants
from fedlora.errors import ConfigError
from fedlora.strategy import catalogue

PLACE = Place("model", "data", 1, False)


def tried(lr: float, loss: float) -> dict[str, Any]:
    return {"lr": lr, "own": {"loss": loss, "mean": 0.5}}


def measured(lr: float, accuracy: list[float], personal: bool = False) -> dict[str, Any]:
    rounds = [{"eval": {"accuracy": a}, "bytes_up": 2_000_000, "bytes_down": 1_000_000} for a in accuracy]
    return {"lr": lr, "own": {"mean": 0.9}, "personal": personal, "rounds": rounds, "seconds": 60.0}


def test_every_built_in_is_a_line() -> None:
    lines = {v.name for v in variants([])}
    assert {e.name for e in catalogue() if e.cls.__module__.startswith("fedlora.strategies.")} <= lines


def test_a_line_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'no "fedavgg".*fedavg'):
        variants(["fedavgg"])


def test_a_rate_is_measured_when_all_of_the_grid_is_tried() -> None:
    one = Variant("fedavg")
    done = {f"{lr:g}": tried(lr, 1 / lr) for lr in GRID}
    assert [r.name for r in ready([one], {})] == [f"{lr:g}" for lr in GRID]
    assert [(r.name, r.lr) for r in ready([one], {"fedavg": done})] == [("final", max(GRID))]
    assert not list(ready([one], {"fedavg": done | {"final": measured(1.0, [0.5])}}))


def test_the_best_rate_is_the_lowest_of_equals_and_none_where_all_failed() -> None:
    assert best_rate({"a": tried(0.3, 0.6), "b": tried(0.1, 0.6), "c": tried(0.2, 0.7)}) == 0.1
    assert best_rate({"a": {"lr": 0.1, "error": "boom"}}) == 0.0


def test_the_table_tells_last_and_best_round_apart_and_no_global_accuracy_of_personal_models() -> None:
    results = {
        "fedavg": {"final": measured(1.5e-2, [0.5, 0.8, 0.7])},
        "fedsa_lora": {"final": measured(5e-3, [0.5], True)},
    }
    lines = table([Variant("fedavg"), Variant("fedsa_lora"), Variant("fed_sb")], results).splitlines()
    assert "| fedavg | 0.015 | 70.0 | 80.0 (2) | 90.0 |" in lines[2]
    assert "| fedsa_lora | 0.005* |  |  | 90.0 |" in lines[3] and "not run" in lines[4]


def test_results_are_gone_on_with_but_not_those_of_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    save(file, PLACE, {"fedavg": {"0.1": tried(0.1, 0.5), "0.2": {"lr": 0.2, "error": "boom"}}})
    assert load(file, PLACE) == {"fedavg": {"0.1": tried(0.1, 0.5)}}
    with pytest.raises(ConfigError, match="other settings"):
        load(file, Place("model", "data", 1, True))
