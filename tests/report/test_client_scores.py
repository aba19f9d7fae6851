"""The answer of a report: whom federation helped, worst client first."""

from dataclasses import replace
from typing import Any

import pytest

from fedlora.report.client_scores import answer, client_scores, compare
from fedlora.report.run_record import RunRecord

SETTINGS = {"data.holdout": 0.2, "dp.epsilon": float("inf"), "dp.noise": 0.0, "dp.level": "record"}
SETTINGS |= {"secure.aggregation": False, "dp.metrics": False}


def a_run(metric: str = "accuracy", **each: list[float]) -> RunRecord:
    """A run whose clients have these scores by each kind of model."""
    told = {row: {str(i): value for i, value in enumerate(values)} for row, values in each.items()}
    stages = {"rows": {row: {"metric": metric} for row in each}, "each": told} if each else {}
    return RunRecord(
        folder="mine",
        settings=SETTINGS,
        rounds=[],
        stages=stages,
        inputs={},
        privacy={},
        audit={},
        about={},
        adapter_check="",
        has_adapter=True,
        is_deployed=False,
    )


def verdict(run: RunRecord) -> str:
    return answer(run, client_scores(run), common_model=True).verdict


@pytest.mark.parametrize(("metric", "before", "alone", "said"), [
    ("accuracy", [0.8, 0.82, 0.84, 0.9], [0.7, 0.71, 0.75, 0.78], "Yes: federation helped 4 of 4 clients"),
    ("perplexity", [8.0, 8.2, 8.4, 9.0], [9.9, 10.1, 10.5, 10.8], "Yes: federation helped 4 of 4 clients"),
    ("accuracy", [0.7, 0.71, 0.75, 0.78], [0.8, 0.82, 0.84, 0.9], "No: by these scores clients are better off alone"),
    ("accuracy", [0.9, 0.6, 0.8], [0.6, 0.9, 0.79], "Not clear: it helped 2 of 3 clients"),
    ("accuracy", [0.9, 0.6], [0.6, 0.9], "Federation helped 1 of 2 clients"),
])  # fmt: skip
def test_the_verdict_follows_the_clients_gains_over_training_alone(
    metric: str, before: list[float], alone: list[float], said: str
) -> None:
    assert verdict(a_run(metric, before=before, alone=alone)).startswith(said)


def test_steps_of_their_own_are_named_where_they_alone_help() -> None:
    run = a_run(before=[0.5, 0.6, 0.7], personal=[0.8, 0.85, 0.9], alone=[0.7, 0.74, 0.82])
    assert "once each client had gone on by itself" in verdict(run)


def test_the_interval_is_that_of_students_distribution_over_clients() -> None:
    scores = client_scores(a_run(before=[0.6, 0.7, 0.8], alone=[0.5, 0.5, 0.5]))
    assert scores is not None
    found = compare(scores, "federated")
    assert found is not None and found.interval == pytest.approx((0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 0.248414), 1e-4)


@pytest.mark.parametrize(("metric", "first"), [("accuracy", "client 1"), ("perplexity", "client 0")])
def test_the_client_that_is_served_worst_comes_first(metric: str, first: str) -> None:
    scores = client_scores(a_run(metric, before=[9.0, 7.0, 8.0], alone=[1.0, 2.0, 3.0]))
    assert scores is not None and scores.rows[0].name == first


def test_without_training_alone_it_is_said_how_to_have_it() -> None:
    found = answer(a_run(), None, common_model=False)
    assert found.verdict == "Not known: no client has trained alone"
    assert found.command == "fedlora simulate --resume mine --personal.alone"


@pytest.mark.parametrize(("changed", "said"), [
    ({"data.holdout": 0.0}, "--data.holdout 0.1 --personal.alone"),
    ({"dp.epsilon": 3.0}, "tell no scores of their own"),
])  # fmt: skip
def test_the_remedy_is_one_that_the_run_can_take(changed: dict[str, Any], said: str) -> None:
    found = answer(replace(a_run(), settings=SETTINGS | changed), None, common_model=True)
    assert said in found.remedy + found.command


def test_scores_of_the_last_round_are_taken_where_no_client_went_on_by_itself() -> None:
    each = {"0": {"loss": 0.4, "accuracy": 0.8}, "1": {"loss": 0.5, "accuracy": 0.7}}
    scores = client_scores(replace(a_run(), rounds=[{"round": 1, "each": each}]))
    assert scores is not None and [row.scores for row in scores.rows] == [{"federated": 0.7}, {"federated": 0.8}]


def test_skewed_labels_are_named_beside_scores_on_own_examples() -> None:
    run = a_run(before=[0.9, 0.9, 0.9], alone=[0.95, 0.94, 0.96])
    data = {"classes": {"yes": [99, 2, 95], "no": [1, 98, 5]}, "heldout": [20, 20, 20]}
    said = " ".join(answer(replace(run, inputs={"data": data}), client_scores(run), common_model=True).sentences)
    assert "97 % of its rows" in said


@pytest.mark.parametrize(("limit", "said"), [(0, "on 90 examples"), (40, "on at most 40 of 90 examples")])
def test_the_common_models_gain_is_told_with_the_examples_that_it_was_measured_on(limit: int, said: str) -> None:
    rounds = [{"round": 1, "before": {"accuracy": 0.5}, "eval": {"accuracy": 0.75}}]
    settings = SETTINGS | {"data.eval_limit": limit}
    run = replace(a_run(), rounds=rounds, settings=settings, inputs={"data": {"evaluation": 90}})
    sentence = answer(run, None, common_model=True).sentences[0]
    assert sentence.startswith("The common model's accuracy went from 50.0\u00a0% to 75.0\u00a0%") and said in sentence
