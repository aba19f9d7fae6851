"""Files that are one client each, and by their names may be none."""

import json
from pathlib import Path

import pytest

from fedlora.data.federated import load
from fedlora.data.file_names import odd_names
from fedlora.data.summary import summarise
from fedlora.sections import DataConfig


@pytest.mark.parametrize(("names", "says"), [
    (["test.jsonl", "train.jsonl"], "train.jsonl and test.jsonl seem"),
    (["test.csv", "train.csv", "validation.csv"], "train.csv and test.csv seem"),
    (["Dev-00000-of-00001.parquet", "train-00000-of-00001.parquet"], "train-00000-of-00001.parquet and Dev-00000"),
])  # fmt: skip
def test_a_training_file_beside_its_test_is_told(names: list[str], says: str) -> None:
    [said] = odd_names([f"data/{name}" for name in names])
    assert said.startswith(says) and "what to train on and what to test on" in said


def test_parts_of_one_dataset_are_told() -> None:
    [said] = odd_names(["d/train-00000-of-00002.parquet", "d/train-00001-of-00002.parquet"])
    assert "seem to be parts of one dataset, and each is a client here" in said


@pytest.mark.parametrize("names", [
    ["client_0.jsonl", "client_1.jsonl"],
    ["train_a.jsonl", "train_b.jsonl"],
    ["berlin.csv", "test.csv"],
    ["test.csv", "dev.csv"],
    ["1-of-2.csv", "a.csv"],
])  # fmt: skip
def test_names_of_clients_are_none_of_that(names: list[str]) -> None:
    assert not [*odd_names(names)]


def test_it_is_among_the_warnings_unless_the_files_are_pooled(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "a b"}) + "\n" + json.dumps({"text": "c"}) + "\n")
    warnings = {}
    for partition, clients in (("auto", 0), ("iid", 2)):
        data = DataConfig(path=str(tmp_path), partition=partition, eval_share=0.0)
        warnings[partition] = summarise(load(data, "auto", clients=clients, seed=0)).warnings
    assert "train.jsonl and test.jsonl seem to be" in warnings["auto"][0]
    assert not warnings["iid"]
