"""What a class is called in each file, and in which order the model has the classes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.classes import labels_of
from fedlora.data.federated import Federated, load
from fedlora.errors import DataError
from fedlora.sections import DataConfig


def parquet(path: Path, names: list[str], labels: list[str]) -> str:
    """A file whose labels are the numbers that these names have in this order."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    columns = {"text": [f"{label} {i}" for i, label in enumerate(labels)], "label": list(map(names.index, labels))}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def read(path: Path | str, clients: int = 0, **others: Any) -> Federated:
    return load(DataConfig(path=str(path), **{"eval_share": 0.0, **others}), "auto", clients=clients, seed=0)


def learned(federated: Federated, rows: Any) -> list[tuple[str, str]]:
    """Of each row the class that its text says, and the class that is learned."""
    schema, numbers = federated.schema, federated.schema.classes()
    return [(row["text"].split()[0], schema.labels[numbers[str(row["label"])]]) for row in rows]


@settings(max_examples=8)
@given(orders=st.lists(st.permutations(["neg", "other", "pos"]), min_size=2, max_size=3))
def test_every_file_is_read_by_its_own_order_of_names(
    tmp_path_factory: pytest.TempPathFactory, orders: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("sites")
    for i, names in enumerate(orders):
        parquet(folder / f"{i}.parquet", names, ["pos", "neg", "other", "pos"])
    test = parquet(folder.with_suffix(".parquet"), ["pos", "other", "neg"], ["other", "pos"])
    for partition in ("auto", "dirichlet:100"):
        federated = read(folder, 0 if partition == "auto" else 2, partition=partition, eval=test)
        for rows in (*federated.clients, federated.evaluation):
            assert all(said == known for said, known in learned(federated, rows))


def test_names_that_are_whole_numbers_are_no_places_in_a_list(tmp_path: Path) -> None:
    federated = read(parquet(tmp_path / "x.parquet", ["1", "2", "0"], ["1", "2", "0"]), 1)
    assert all(said == known for said, known in learned(federated, federated.clients[0]))


def test_a_class_that_is_written_down_but_has_no_training_row_is_known(tmp_path: Path) -> None:
    train = parquet(tmp_path / "train.parquet", ["neg", "pos", "other"], ["neg", "pos"])
    federated = read(train, 1, eval=parquet(tmp_path / "test.parquet", ["neg", "pos", "other"], ["other", "neg"]))
    assert learned(federated, federated.evaluation) == [("other", "other"), ("neg", "neg")]


def test_a_row_without_a_class_is_refused(tmp_path: Path) -> None:
    """As datasets writes it: -1."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"text": ["x"] * 3, "label": [0, 1, -1]}, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r'x\.parquet row 3: label "-1" is no class'):
        read(tmp_path / "x.parquet", 1)


def test_names_given_in_the_settings_are_matched_by_name_and_not_by_place(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", ["neg", "pos"], ["neg", "pos"])
    federated = read(path, 1, labels=("pos", "neg"))
    assert federated.schema.labels == ("pos", "neg")
    assert all(said == known for said, known in learned(federated, federated.clients[0]))


def test_names_given_in_the_settings_may_be_new_ones(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", ["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"])
    federated = read(path, 1, labels=("neg", "pos"))
    assert labels_of(federated.clients[0], federated.schema) == [("0",), ("1",)]


def test_the_neighbour_of_a_number_is_the_same_number(tmp_path: Path) -> None:
    for name, labels in (("float", ["0.0", "1.0"]), ("int", ["0", "1"])):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"w,{label}\n" for label in labels))
    with pytest.raises(DataError, match=r'int\.csv line 2: label "0" is no class .* did you mean "0\.0"\?'):
        read(tmp_path / "float.csv", 1, eval=str(tmp_path / "int.csv"))


def test_one_class_in_files_of_two_kinds_is_shared_out_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", "label": i % 2}) + "\n" for i in range(8)))
    (tmp_path / "b.csv").write_text("text,label\n" + "".join(f"t,{i % 2}\n" for i in range(8)))
    federated = read(tmp_path, 2, partition="labels:1")
    assert [len(set(labels_of(rows, federated.schema))) for rows in federated.clients] == [1, 1]
