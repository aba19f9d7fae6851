"""The table: what a row shows, and its forms for programs and papers."""

import csv
import json
from io import StringIO
from typing import Any

import pytest

from fedlora.comparison.console import show_table
from fedlora.comparison.formats import PRINTED, cells, metrics
from fedlora.comparison.packed import pack
from fedlora.comparison.results import Results
from fedlora.comparison.schedule import Schedule
from fedlora.comparison.table import Row, rows
from tests.support.comparisons import comparison

RATES = [0.001, 0.01, 0.1]


def record(right: int, loss: float = 0.5, **more: Any) -> dict[str, Any]:
    """The record of a run that had so many of ten examples of the test split right."""
    test = {"values": {"accuracy": right / 10, "loss": loss}, "of": "accuracy", "set": "x"}
    own = {"metric": "accuracy", "mean": 0.5, "worst": 0.25, "loss": loss}
    examples = pack([1.0] * right + [0.0] * (10 - right))
    costs = {"bytes_up": [0, 1000, 3000], "exactness": [0.5, None, 0.25], "cpu": 60.0}
    return {"choice": own, "own": own, "test": {**test, "examples": examples}, **costs, **more}


def played(made: Schedule, right: dict[str, int]) -> Results:
    """The results of all runs, where a line of a case has so many right in its first seed and one less in the next."""
    results: Results = {}
    while run := next(made.ready(results), None):
        results[made.name(run)] = {"record": record(right[run.line.name] - run.seed, **run.case.settings)}
    return results


@pytest.fixture(scope="module")
def shown() -> list[Row]:
    made = comparison(
        {}, strategies=["fedavg", "ffa_lora"], seeds=2, cases={"plain": {}, "epsilon 3": {"dp.epsilon": 3.0}}
    )
    schedule = Schedule(made)
    return rows(schedule, played(schedule, {"alone": 3, "pooled": 9, "fedavg": 7, "ffa_lora": 6}))


def test_a_row_has_means_with_intervals_and_bytes_of_a_later_round(shown: list[Row]) -> None:
    head, body = cells(shown[:4])
    row = dict(zip(head, body[2], strict=True))
    assert row["strategy"] == "fedavg" and row["test"].startswith("65.0 ± 63.5") and row["worst client"] == "25.0 ± 0.0"
    assert (row["up"], row["off the mean"], row["CPU s"]) == ("2.0 kB", "5.0e-01", "60")
    assert [line[0] for line in body] == ["alone", "pooled", "fedavg", "ffa_lora"]


def test_others_are_compared_with_the_first_strategy_within_their_case(shown: list[Row]) -> None:
    head, body = cells(shown[:4])
    found = [dict(zip(head, line, strict=True))["from fedavg"] for line in body]
    assert found[2] == "" and found[0].startswith("-40.0 ±") and found[1].startswith("+20.0 ±")


def test_what_is_not_there_is_said() -> None:
    made = comparison({"train.lr": 0.01}, strategies=["fedavg", "flora"], seeds=2, tune={"train.lr": RATES})
    schedule = Schedule(made)
    runs = [run for run in schedule.ready({}) if not run.line.baseline]
    results = {schedule.name(runs[0]): {"record": record(7)}, schedule.name(runs[1]): {"record": {"error": "no room"}}}
    head, body = cells(rows(schedule, results))
    found = {line[0]: dict(zip(head, line, strict=True)) for line in body}
    assert found["alone"]["test"] == "not run" and found["flora"]["test"] == "no room"
    assert found["fedavg"]["train.lr"] == "0.01?" and found["fedavg"]["seeds"] == "1 of 2"
    assert found["fedavg"]["test"] == "70.0"


def test_a_value_at_an_end_of_what_was_tried_is_marked() -> None:
    made = comparison({"train.lr": 0.1}, strategies=["fedavg"], seeds=1, tune={"train.lr": RATES})
    schedule = Schedule(made)
    results: Results = {}
    while run := next(schedule.ready(results), None):
        results[schedule.name(run)] = {"record": record(5, loss=1 - dict(run.tuned)["train.lr"])}
    assert all(line[1] == "0.1*" for line in cells(rows(schedule, results))[1])


def test_the_forms_hold_the_same_rows(shown: list[Row]) -> None:
    found = json.loads(PRINTED["json"](shown))
    lines = list(csv.DictReader(StringIO(PRINTED["csv"](shown))))
    assert [row["line"] for row in found] == [row["line"] for row in lines] and len(found) == 8
    assert float(lines[2]["test accuracy"]) == found[2]["figures"]["test accuracy"]["mean"] == pytest.approx(0.65)
    assert found[3]["difference"]["p_holm"] >= found[3]["difference"]["p"]
    markdown, latex = PRINTED["markdown"](shown), PRINTED["latex"](shown)
    assert markdown.count("| --- |") and "epsilon 3:" in markdown and markdown.count("\n| ffa_lora |") == 2
    assert latex.count(r"\toprule") == 2 and r"ffa\_lora & " in latex and r"$\pm$" in latex and "±" not in latex


def test_the_metric_and_its_unit_are_named_below_the_table(
    shown: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    show_table(shown)
    assert "\n\nShown is accuracy in per cent.\nMeans over seeds" in capsys.readouterr().out
    assert metrics([]) == ""
