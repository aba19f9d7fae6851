"""What is told of the data before a run starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.data.federated import load
from fedlora.data.summary import DataSummary, _quantities, summarise
from fedlora.sections import DataConfig


def summary(path: Path, *rows: dict[str, Any], clients: int = 1, **settings: Any) -> DataSummary:
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(path=str(path), **{"eval_share": 0.0, **settings})
    return summarise(load(data, "auto", clients=clients, seed=0))


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": "a", "label": label} for label in labels]


def test_columns_that_are_used_and_texts_that_are_left_are_told(tmp_path: Path) -> None:
    row = {"id": 7, "instruction": "a", "input": "b", "output": "c", "note": "d", "when": "2020"}
    told = summary(tmp_path / "x.jsonl", row)
    assert told.used == ("instruction", "input", "output")
    assert told.left == ("note",)


def test_classes_are_counted_at_every_client(tmp_path: Path) -> None:
    for name, labels in (("a", "xxy"), ("b", "yyyy")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(*labels)))
    told = summary(tmp_path, clients=0)
    assert told.sizes == (3, 4)
    assert told.classes == {"x": (2, 0), "y": (1, 4)}


@pytest.mark.parametrize(("labels", "says"), [
    (["pos", "neg", "pos "], 'the classes "pos", "pos " differ by blanks or capitals alone'),
    (["Yes", "no", "yes"], 'the classes "Yes", "yes" differ by blanks or capitals alone'),
    (["0", "1", "1.0"], 'the classes "1", "1.0" are the same number'),
    ([0, 1, "no", "yes"], 'some classes are numbers ("0", "1") and others are words ("no", "yes")'),
    (["caf\u00e9", "cafe\u0301", "tea"], r'the classes "cafe\u0301", "caf\xe9" look the same'),
    (["so so", "so\u00a0so", "good"], r'the classes "so so", "so\xa0so" look the same'),
    (["good", "go\u200bod", "bad"], r'the classes "good", "go\u200bod" look the same'),
    ([0, 1, -1], 'the class "-1" may stand for a label that is missing'),
    (["a", "b", "nan"], 'the class "nan" looks like a label that is missing'),
])  # fmt: skip
def test_classes_that_look_wrong_are_told_in_words(tmp_path: Path, labels: list[Any], says: str) -> None:
    assert any(warning.startswith(says) for warning in summary(tmp_path / "x.jsonl", *labelled(*labels)).warnings)


def test_a_class_for_every_row_is_told(tmp_path: Path) -> None:
    told = summary(tmp_path / "x.jsonl", *labelled(*(f"note {i}" for i in range(24))))
    assert told.warnings == ("24 training rows have 24 classes: is that the column of the classes?",)


def test_good_classes_have_no_warning(tmp_path: Path) -> None:
    assert summary(tmp_path / "x.jsonl", *labelled("cat", "dog", "bird")).warnings == ()
    assert summary(tmp_path / "y.jsonl", *labelled(-1, 1, 2)).warnings == ()


def test_a_class_without_a_training_row_is_told(tmp_path: Path) -> None:
    told = summary(tmp_path / "x.jsonl", *labelled("a", "b"), labels=("a", "b", "c"))
    assert told.warnings == ('no training row is of the class "c"',)


def test_columns_with_nearly_one_name_are_told(tmp_path: Path) -> None:
    told = summary(tmp_path / "x.jsonl", {"text": "a", "Text ": "b"})
    assert told.warnings == ('the columns "text", "Text " differ by blanks or capitals alone',)


def test_numbers_that_are_too_large_to_learn_are_told(tmp_path: Path) -> None:
    told = summary(tmp_path / "x.jsonl", {"text": "a", "label": 20.5}, {"text": "b", "label": 120})
    assert told.numbers == (20.5, 70.25, 120) and not told.classes
    assert [warning[:45] for warning in told.warnings] == ['the numbers in "label" go from 20.5 to 120, a']


def test_the_labels_of_a_row_are_each_counted(tmp_path: Path) -> None:
    told = summary(tmp_path / "x.jsonl", *({"text": "a", "label": names} for names in (["x", "y"], [], ["y"])))
    assert {name: sum(counts) for name, counts in told.classes.items()} == {"x": 1, "y": 2}


def test_many_classes_that_are_numbers_are_told() -> None:
    assert [*_quantities([str(age) for age in range(18, 60)])] == [
        "all 42 classes are numbers: if they measure something, set model.task = regression"
    ]
