"""The benchmark of LA-LoRA's claim: which runs are left to do, at which rates, and that all of it runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import smoke
from benchmarks.federations import Place
from benchmarks.la_lora import AS_A_RATE, RATES, ClaimRun, lines, measure, rate_of, ready, table
from benchmarks.sweep import Results

BY_NAME = {line.key: line for line in lines()}
ON, SLOWER = BY_NAME["LA-LoRA, none"], BY_NAME["LA-LoRA without filter, rate x 0.52, none"]


def tried(*losses: float) -> dict[str, Any]:
    return {f"{lr:g}": {"lr": lr, "choice": {"loss": loss}} for lr, loss in zip(RATES, losses, strict=False)}


def test_every_line_is_run_without_privacy_and_at_both_epsilons() -> None:
    assert [sum(line.epsilon == epsilon for line in lines()) for epsilon in (None, 3.0, 1.0)] == [6, 6, 6]
    assert {line.name for line in lines(["la_lora"])} == {line.name for line in lines() if "LA-LoRA" in line.name}


def test_rates_are_tried_until_the_loss_rises_and_the_best_is_measured() -> None:
    assert [run.lr for run in ready([ON], (0, 1), {})] == [RATES[0]]
    assert [run.lr for run in ready([ON], (0, 1), {ON.key: tried(0.6, 0.5)})] == [RATES[2]]
    measured = list(ready([ON], (0, 1), {ON.key: tried(0.6, 0.5, 0.7)}))
    assert [(run.lr, run.seed, run.name) for run in measured] == [(RATES[1], 0, "seed 0"), (RATES[1], 1, "seed 1")]


def test_the_run_without_a_filter_goes_by_half_the_rate_of_the_run_with_it() -> None:
    assert rate_of(SLOWER, {ON.key: tried(0.6, 0.5)}) == 0  # whose grid is not done
    results = {ON.key: tried(0.6, 0.5, 0.7)}
    assert [run.lr for run in ready([SLOWER], (0,), results)] == [AS_A_RATE * RATES[1]]


def test_the_table_has_the_mean_of_the_seeds_and_a_star_at_an_end_of_the_grid() -> None:
    def run(seed: int, accuracy: float) -> dict[str, Any]:
        last = {"eval": {"accuracy": accuracy}, "bytes_up": 12_000, "clients": 6}
        return {f"seed {seed}": {"lr": RATES[0], "own": {"mean": 0.7, "loss": 0.5}, "rounds": [last]}}

    row = table([ON], {ON.key: run(0, 0.6) | run(1, 0.7)}).splitlines()[2]
    assert row == "| LA-LoRA | none | 0.1* | 65.0 | 60.0 to 70.0 | 70.0 | 2.0 kB |"
    assert "not run" in table([ON], {})


def test_all_of_it_runs(tmp_path: Path) -> None:
    model = smoke.federations(tmp_path)
    place, results = Place(model, str(tmp_path), "", threads=1, smoke=True), Results()
    plain = [replace(line, rates=RATES[:1]) for line in (ON, SLOWER)]  # as in a smoke run
    while run := next(ready(plain, (0,), results), None):
        results.setdefault(run.line, {})[run.name] = measure(place, run)
    assert len(table(plain, results).splitlines()) == 2 + 2 and "not run" not in table(plain, results)
    private = measure(place, ClaimRun(replace(ON, epsilon=1.0), RATES[0]))
    assert private["rounds"][-1]["epsilon"] > 0 and private["own"]["loss"] > 0
