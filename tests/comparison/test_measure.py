"""A run of a comparison is that of `fedlora simulate` with the same settings; the baselines are what they say."""

from pathlib import Path
from typing import Any

import pytest

from fedlora import config as configuration
from fedlora import simulate
from fedlora.comparison.measure import measure
from fedlora.comparison.packed import unpack
from tests.support.comparisons import comparison, job


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return job(tmp_path_factory.mktemp("comparison"))


def record(given: dict[str, Any], line: str = "", **more: Any) -> dict[str, Any]:
    made = comparison(given, strategies=[more.pop("strategy", "fedavg")])
    chosen = next(one for one in made.lines if one.baseline == line)
    return measure(made.config(chosen, made.cases[0], more), line)


@pytest.mark.parametrize("more", [
    {"strategy": "fedavg"},
    {"strategy": "flora", "lora.ranks": "1,2,2"},
    {"strategy": "ffa_lora", "dp.noise": 1.0, "dp.seeded": True, "dp.metrics": True},
    {"strategy": "fedavg", "dp.noise": 1.0, "dp.level": "client", "dp.seeded": True, "dp.metrics": True},
], ids=lambda more: "-".join(map(str, more.values())))  # fmt: skip
def test_a_run_is_that_of_simulate(given: dict[str, Any], more: dict[str, Any], tmp_path: Path) -> None:
    found = record(given, **more)
    run = simulate(given | more, out=tmp_path / "run", progress=False)
    losses = [r["train_loss"] or 0.0 for r in run.rounds]  # none is told under DP-SGD
    assert found.get("train_loss", [0.0, 0.0]) == pytest.approx(losses, rel=1e-6)
    assert found["test"]["values"] == pytest.approx(dict(run.evaluation), rel=1e-6)
    assert found["bytes_up"] == [r["bytes_up"] for r in run.rounds]
    assert found.get("epsilon") == run.rounds[-1].get("epsilon")
    assert sum(unpack(found["test"]["examples"])) / 30 == pytest.approx(run.evaluation["accuracy"])


def test_alone_is_what_clients_make_of_their_own_rows_as_in_a_run(given: dict[str, Any], tmp_path: Path) -> None:
    found = record(given, "alone")
    whole = simulate(given | {"personal.alone": True}, out=tmp_path / "run", progress=False).personal["each"]["alone"]
    halves = [found[half]["each"] for half in ("choice", "own")]
    assert {i: (halves[0][i] + halves[1][i]) / 2 for i in whole} == pytest.approx(whole)
    assert "bytes_up" not in found and found["personal"]


def test_pooled_is_a_run_of_one_client_with_all_rows_and_all_steps(given: dict[str, Any], tmp_path: Path) -> None:
    found = record(given, "pooled")
    rows = "".join((Path(given["data.path"]).parent / f"client_{i}.jsonl").read_text() for i in range(3))
    (tmp_path / "all.jsonl").write_text(rows)
    one = {"data.path": str(tmp_path / "all.jsonl"), "clients": 1, "cohort": 1, "rounds": 1, "train.steps": 12}
    alike = simulate(given | one | {"data.partition": "iid", "data.holdout": 0.0}, out=tmp_path / "run", progress=False)
    assert set(found["test"]["values"]) == set(alike.evaluation)
    assert found["own"]["clients"] == 3 and not found["personal"]


def test_where_clients_keep_a_part_the_test_split_is_put_to_every_ones_model(given: dict[str, Any]) -> None:
    found = record(given, strategy="fedsa_lora")
    assert found["personal"] and {round(3 * x) for x in unpack(found["test"]["examples"])} <= {0, 1, 2, 3}


def test_a_run_in_which_nobody_comes_to_a_number_has_diverged(given: dict[str, Any]) -> None:
    found = record(given, **{"train.lr": 1e3, "train.optimizer": "sgd", "train.clip": 0.0, "train.steps": 30})
    assert found["diverged"] and "diverged" not in record(given)


def test_no_ledger_is_charged(given: dict[str, Any], tmp_path: Path) -> None:
    made = comparison(given | {"dp.noise": 1.0, "dp.ledger": str(tmp_path / "ledger")}, strategies=["fedavg"])
    assert made.config(made.lines[2], made.cases[0], {}).dp.ledger == ""
    assert configuration.build(given).dp.ledger == ""
