"""Which runs are left to do: the walk over what is tuned, and the seeds at the best point."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.comparison.results import Results
from fedlora.comparison.schedule import ComparisonRun, Schedule
from tests.support.comparisons import comparison

RATES = [0.001, 0.003, 0.01, 0.03, 0.1]


def schedule(**tree: Any) -> Schedule:
    return Schedule(comparison({"train.lr": 0.01}, strategies=["fedavg"], **tree))


def done(loss: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {"record": {"choice": {"loss": loss}, **more}}


def played(made: Schedule, losses: dict[float, float]) -> list[ComparisonRun]:
    """Every run that is asked for in turn, where a rate has this loss."""
    results: Results = {}
    runs = []
    while run := next(made.ready(results), None):
        runs.append(run)
        results[made.name(run)] = done(losses[dict(run.tuned)["train.lr"]])
    return runs


def of_strategy(runs: list[ComparisonRun]) -> list[ComparisonRun]:
    return [run for run in runs if not run.line.baseline]


def test_without_anything_to_tune_a_line_has_a_run_for_each_seed() -> None:
    made = schedule(seeds=[0, 7])
    results: Results = {}
    for run in (runs := list(made.ready(results))):
        results[made.name(run)] = done()
    assert [run.line.name for run in runs] == ["alone", "pooled", "fedavg"]
    assert [run.seed for run in made.ready(results)] == [7, 7, 7]


@settings(max_examples=20)
@given(st.lists(st.floats(0.1, 9.0), min_size=5, max_size=5))
def test_the_walk_ends_where_both_neighbours_of_the_best_are_no_lower(losses: list[float]) -> None:
    by_rate = dict(zip(RATES, losses, strict=True))
    runs = of_strategy(played(schedule(seeds=2, tune={"train.lr": RATES}), by_rate))
    tried = [dict(run.tuned)["train.lr"] for run in runs if run.seed == 0]
    best = dict(runs[-1].tuned)["train.lr"]
    assert tried[0] == 0.01 and len(set(tried)) == len(tried) and runs[-1].seed == 1
    beside = RATES[max(0, RATES.index(best) - 1) : RATES.index(best) + 2]
    assert {*beside} <= {*tried} and by_rate[best] == min(by_rate[rate] for rate in tried)


def test_the_point_where_a_walk_begins_is_tried_whatever_the_file_has() -> None:
    """A loss may have two minima: whoever begins elsewhere than the runs in the file gets to the other one too."""
    by_rate = dict(zip(RATES, [0.7, 0.8, 0.9, 0.5, 0.6], strict=True))
    made = Schedule(comparison({"train.lr": 0.03}, strategies=["fedavg"], seeds=1, tune={"train.lr": RATES}))
    line, case = made.comparison.lines[2], made.comparison.cases[0]
    runs = [ComparisonRun(line, case, 0, (("train.lr", rate),)) for rate in RATES[:2]]
    results: Results = {made.name(run): done(by_rate[dict(run.tuned)["train.lr"]]) for run in runs}
    while run := next((run for run in made.ready(results) if run.line == line), None):
        results[made.name(run)] = done(by_rate[dict(run.tuned)["train.lr"]])
    assert made.chosen(line, case, results).tuned == {"train.lr": 0.03}


def test_several_keys_are_walked_along_each() -> None:
    made = schedule(tune={"train.lr": RATES, "lora.rank": [2, 4, 8]})
    line, case = made.comparison.lines[2], made.comparison.cases[0]
    first = next(run for run in made.ready({}) if run.line == line)
    assert dict(first.tuned) == {"train.lr": 0.01, "lora.rank": 4}
    found = {made.name(first): done()}
    after = [run.tuned for run in made.ready(found) if (run.line, run.case) == (line, case)]
    assert len(after) == 4 and all(sum(a != b for a, b in zip(one, first.tuned, strict=True)) == 1 for one in after)


def test_a_rate_at_which_training_comes_to_no_number_is_the_worst_and_a_refusal_ends_the_line() -> None:
    made = schedule(tune={"train.lr": RATES}, seeds=1)
    first = of_strategy(list(made.ready({})))[0]
    diverged = {made.name(first): {"record": {"error": "nan", "diverged": True}}}
    assert len(of_strategy(list(made.ready(diverged)))) == 2
    refused = {made.name(first): {"record": {"error": "no"}}}
    assert not of_strategy(list(made.ready(refused)))
    assert made.why_not(first.line, first.case, refused) == "no"
