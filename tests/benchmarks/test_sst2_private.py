"""The private run on SST-2: what the grid is, which run is shown, and what is marked."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sst2_private
from benchmarks.sst2_private import CLIPS, RATES, Line, best, grid, lines, ready, table
from fedlora import config as configuration
from fedlora.errors import ConfigError

LINE = Line("FedIT", "fedavg", epsilon=3.0)


def ran(lr: float, clip: float, loss: float, accuracy: float = 0.6) -> dict[str, Any]:
    rounds = [{"round": t, "eval": {"accuracy": a}, "epsilon": t} for t, a in ((2, 0.7), (4, accuracy))]
    return {"lr": lr, "clip": clip, "own": {"loss": loss, "mean": 0.5}, "rounds": rounds, "noise": [0.5, 0.75]}


def test_every_strategy_is_run_with_privacy_and_without_on_one_grid() -> None:
    every = lines()
    assert len(every) == 10 and sum(line.epsilon is None for line in every) == 5
    assert len(list(grid(LINE))) == len(RATES) * len(CLIPS)
    assert [run.lr for run in grid(Line("FedIT", "fedavg"))] == list(RATES)


def test_what_is_done_is_not_done_again() -> None:
    first, *others = grid(LINE)
    assert list(ready([LINE], {LINE.key: {first.name: ran(1.0, 1.0, 0.6)}})) == others


def test_rates_above_one_at_which_the_loss_rose_are_not_tried() -> None:
    worse = {"1, clip 1": ran(1.0, 1.0, 0.6), "3, clip 1": ran(3.0, 1.0, 0.7), "3, clip 3": ran(3.0, 3.0, 0.65)}
    better = worse | {"3, clip 3": ran(3.0, 3.0, 0.5)}
    assert {run.lr for run in ready([LINE], {LINE.key: worse})} == {1.0}
    assert {run.lr for run in ready([LINE], {LINE.key: better})} == {1.0, 9.0}


def test_the_run_with_the_lowest_loss_is_shown_with_its_last_round() -> None:
    done = {"a": ran(1.0, 0.3, 0.6), "b": ran(3.0, 1.0, 0.5, 0.65), "c": {"error": "boom"}}
    assert best(done) is done["b"] and best({"c": {"error": "boom"}}) is None
    row = table([LINE], {LINE.key: done}).splitlines()[2]
    assert "| FedIT | 3 | 3 | 1 | 65.0 | 50.0 | 0.5000 | 0.50 to 0.75 | 4.00 |" in row


def test_a_rate_at_an_end_of_the_grid_is_marked() -> None:
    assert "| 9* |" in table([LINE], {LINE.key: {"a": ran(9.0, 1.0, 0.5)}})


def test_a_strategy_that_is_none_of_these_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'no "flora"; did you mean "ffa_lora"'):
        lines(["flora"])


def test_its_settings_exist(tmp_path: Path) -> None:
    made = configuration.build(sst2_private.SETTINGS, *(line.options for line in lines()))
    assert made.model.head == "frozen" and made.train.optimizer == "sgd"


def test_the_docs_have_the_table_of_the_runs_that_are_kept() -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "sst2_private.json").read_text())["runs"]
    docs = (root / "docs" / "privacy.md").read_text()
    assert table(lines(), results) in docs and f"has all {sum(map(len, results.values()))} runs" in docs
