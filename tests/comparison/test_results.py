"""The file of results: what a run's name follows from, and what of the file is gone on with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import config as configuration
from fedlora.comparison.packed import pack, unpack
from fedlora.comparison.results import load, run_name, save, settings_of
from fedlora.errors import ConfigError
from tests.support.comparisons import job


def name(given: dict[str, Any], baseline: str = "", **more: Any) -> str:
    return run_name(configuration.build(given, more), baseline)


def test_a_run_is_known_by_its_settings_whatever_their_order_and_wherever_its_files_are(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    one, other = job(tmp_path / "here"), job(tmp_path / "there")
    assert name(one) == name(dict(reversed(other.items()))) == name(other, **{"threads": 2, "model.device": "cpu"})
    assert len({name(one), name(one, seed=1), name(one, "alone"), name(one, **{"train.lr": 0.1})}) == 4


def test_a_run_on_other_rows_is_another_run(tmp_path: Path) -> None:
    given = job(tmp_path)
    before = name(given)
    (tmp_path / "other.jsonl").write_text((tmp_path / "test.jsonl").read_text().replace("w1", "w2"))
    assert name(given, **{"data.eval": str(tmp_path / "other.jsonl")}) != before


def test_a_setting_at_its_default_is_in_no_name() -> None:
    config = configuration.build({"rounds": 10, "train.lr": 0.5})
    assert settings_of(config) == {"train.lr": 0.5}
    assert settings_of(replace(config, threads=3)) == {"train.lr": 0.5}


def test_what_failed_is_tried_again_and_what_came_to_no_number_is_not(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    good, nan, bad = ({"record": r} for r in ({"cpu": 1.0}, {"error": "nan", "diverged": True}, {"error": "no room"}))
    save(file, {"a": good, "b": nan, "c": bad})
    assert load(file) == {"a": good, "b": nan} and load(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": 99, "runs": {}})])
def test_a_file_that_is_something_else_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        load(tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == text


@given(st.lists(st.sampled_from([0.0, 1.0])) | st.lists(st.floats(0, 9)))
def test_the_figures_of_examples_come_back_to_three_digits(figures: list[float]) -> None:
    assert unpack(json.loads(json.dumps(pack(figures)))) == [round(figure, 3) for figure in figures]
