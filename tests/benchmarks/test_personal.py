"""The table of models for each client: which runs are left, which rate a row has, and that all of it runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import personal, smoke
from benchmarks.personal import GRID, METHODS, Place, best_rates, ready, table


def ran(lr: float, seed: int = 0, **means: float) -> dict[str, Any]:
    figures = {"metric": "accuracy", "worst": 0.1, "worst_client": 0, "std": 0.2, "clients": 6, "lost": 1}
    return {
        "lr": lr,
        "seed": seed,
        "rows": {row.replace("_", " + "): {**figures, "mean": m} for row, m in means.items()},
    }


def test_every_row_is_measured_at_the_rate_that_is_best_for_it() -> None:
    place, (method, *_) = Place((), 20, smoke=False), METHODS
    assert [run.lr for run in ready(place, 2, {}) if run.line == method] == [*GRID]
    done = {f"chosen by {lr:g} 0": ran(lr, common=0.5 + lr, alone=0.5 - lr) for lr in GRID}
    assert best_rates(done) == {"common": GRID[-1], "alone": GRID[0]}
    left = [(run.lr, run.seed) for run in ready(place, 2, {method: done}) if run.line == method]
    assert left == [(lr, seed) for lr in (GRID[0], GRID[-1]) for seed in (0, 1)]
    measured = done | {f"measured {lr:g} {seed}": ran(lr, seed, common=0.8, alone=0.6) for lr, seed in left}
    assert not [run for run in ready(place, 2, {method: measured}) if run.line == method]
    assert "| alone | 0.005* | 0.6000 ± 0.0000 |" in table({method: measured})


def here(ready: Any, measure: Any, said: Any, file: tuple[Path, Any], jobs: int) -> Any:
    """A sweep in this process: a fresh one takes seconds to load torch."""
    results: dict[str, Any] = {}
    while run := next(ready(results), None):
        results.setdefault(run.line, {})[run.name] = measure(run)
        print(said(run, results[run.line][run.name]))
    file[0].write_text(json.dumps({"settings": {}, "runs": results}))
    return results


def test_all_of_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal, "METHODS", {"common (fedavg)": METHODS["common (fedavg)"]})
    monkeypatch.setattr(personal, "sweep", here)
    model, data = smoke.inputs("classify", tmp_path)
    words = ["--model", model, "--data", f"{data}/train.csv", "--smoke", "--jobs", "1"]
    personal.main([*words, "--out", str(tmp_path / "personal.json")])
    runs = json.loads((tmp_path / "personal.json").read_text())["runs"]
    assert [run for of_method in runs.values() for run in of_method.values() if "error" in run] == []
    said = capsys.readouterr().out
    for row in ("common (fedavg)", "common (fedavg) + 2 steps, lambda 0.1", "alone"):
        assert f"| {row} |" in said and "not run" not in said
