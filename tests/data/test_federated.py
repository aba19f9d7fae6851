"""Whose examples are whose, and what is said of data that cannot be used."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedlora.data.federated import Federated, load
from fedlora.errors import ConfigError, DataError
from fedlora.sections import DataConfig

IMPORT = "from fedlora.data.federated import load; from fedlora.sections import DataConfig"


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(n: int, classes: int = 2) -> list[dict[str, Any]]:
    return [{"sentence1": f"s{i}", "sentence2": None, "label": i % classes} for i in range(n)]


def read(path: str, clients: int = 2, task: str = "auto", **settings: Any) -> Federated:
    return load(DataConfig(path=path, **{"eval_share": 0.0, **settings}), task, clients=clients, seed=0)


def everything(federated: Federated) -> list[dict[str, Any]]:
    parts = [*federated.clients, *federated.heldout, federated.evaluation]
    return sorted((dict(row) for rows in parts for row in rows), key=str)


def test_without_a_path_the_standard_library_is_the_data() -> None:
    federated = load(DataConfig(), "auto", clients=0, seed=0)
    assert federated.schema.kind == "text"
    assert len(federated.clients) == len(federated.heldout) == 50
    assert {"text", "package", "path"} == set(federated.clients[0][0]) == set(federated.evaluation[0])
    assert not any(map(len, federated.heldout))


def test_the_embedded_data_does_not_wait_for_datasets() -> None:
    code = f"import sys; {IMPORT}; load(DataConfig(), 'auto', clients=3, seed=0); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"fedlora.data.python_stdlib"} <= set(loaded)
    assert not {"datasets", "pandas", "flwr_datasets", "pyarrow"} & set(loaded)


@pytest.mark.parametrize(("task", "clients", "settings", "says"), [
    ("classify", 0, {}, r"set data\.path"),
    ("auto", 0, {"partition": "iid"}, r"data\.partition = \"iid\" needs data of your own"),
    ("auto", 10**6, {}, "clients = 1000000: the standard library has text for 1 to .*; ask for fewer"),
])  # fmt: skip
def test_the_embedded_data_refuse_what_they_cannot_do(task: str, clients: int, settings: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(DataConfig(**settings), task, clients=clients, seed=0)


def test_the_embedded_data_may_be_evaluated_on_others_and_held_out_from(tmp_path: Path) -> None:
    federated = load(
        DataConfig(eval=jsonl(tmp_path / "e.jsonl", {"text": "x = 1"}), holdout=0.1), "lm", clients=20, seed=0
    )
    assert [dict(row) for row in federated.evaluation] == [{"text": "x = 1"}]
    assert all(map(len, federated.heldout))


def test_a_pattern_is_one_file_a_client_in_natural_order(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        jsonl(tmp_path / f"client_{i}.jsonl", *labelled(i + 2))
    federated = read(str(tmp_path / "client_*.jsonl"), 0, eval=jsonl(tmp_path / "val.jsonl", *labelled(4)))
    assert [len(rows) for rows in federated.clients] == [3, 11, 12]
    assert federated.schema.columns == ("sentence1", "label")
    assert federated.schema.labels == ("0", "1")
    assert len(federated.evaluation) == 4


def test_a_folder_of_files_is_one_file_a_client(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", *labelled(3))
    (tmp_path / "b.csv").write_text('sentence1,label\n"one, two\nlines",1\nthree,0\n')
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    federated = read(str(tmp_path), 0)
    assert federated.clients[1][0] == {"sentence1": "one, two\nlines", "label": "1"}
    assert [len(rows) for rows in federated.clients] == [3, 2]


def test_a_folder_of_images_is_told_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.PNG").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no data; .*; of images write such a file, with a column image"):
        read(str(tmp_path), 0)


def test_several_files_can_be_pooled_and_shared_out_again(tmp_path: Path) -> None:
    for i in range(3):
        jsonl(tmp_path / f"{i}.jsonl", *labelled(10))
    assert len(read(str(tmp_path), 5, partition="iid").clients) == 5


def test_other_clients_than_files_are_refused(tmp_path: Path) -> None:
    for i in range(3):
        jsonl(tmp_path / f"{i}.jsonl", *labelled(10))
    with pytest.raises(ConfigError, match=r"clients = 5, but .* has 3; leave clients at 0, or set data\.partition"):
        read(str(tmp_path), 5)


@pytest.mark.parametrize("split", ["content", "sample"])
@pytest.mark.parametrize("partition", ["auto", "dirichlet:5", "natural:label"])
def test_nothing_is_lost_between_training_holdout_and_evaluation(tmp_path: Path, partition: str, split: str) -> None:
    rows = labelled(80)
    path = jsonl(tmp_path / "all.jsonl", *rows)
    federated = read(path, 2, eval_share=0.1, holdout=0.25, partition=partition, split=split)
    assert everything(federated) == sorted(rows, key=str)


@pytest.mark.parametrize("partition", ["auto", "dirichlet:5", "natural:label"])
def test_a_sample_has_exactly_the_share_that_was_asked_for(tmp_path: Path, partition: str) -> None:
    path = jsonl(tmp_path / "all.jsonl", *labelled(80))
    federated = read(path, 2, eval_share=0.1, holdout=0.25, partition=partition, split="sample")
    assert len(federated.evaluation) == 8
    assert all(
        abs(len(h) - (len(h) + len(c)) / 4) <= 1 for c, h in zip(federated.clients, federated.heldout, strict=True)
    )


def test_with_a_file_a_client_the_evaluation_is_taken_from_each(tmp_path: Path) -> None:
    for i in range(3):
        jsonl(tmp_path / f"{i}.jsonl", *({"text": f"{i}"} for _ in range(10)))
    federated = read(str(tmp_path), 0, eval_share=0.01)
    assert [row["text"] for row in federated.evaluation] == ["0", "1", "2"]


def test_the_seed_alone_decides_the_draw(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "all.jsonl", *labelled(50))
    first, again, other = (
        load(DataConfig(path=path, holdout=0.2), "auto", clients=3, seed=seed).clients for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_limit_is_of_the_data_and_of_the_evaluation(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "all.jsonl", *labelled(50))
    federated = read(path, 2, limit=6, eval=path)
    assert sum(map(len, federated.clients)) == len(federated.evaluation) == 6


def test_a_natural_partition_has_as_many_clients_as_there_are_ids(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "all.jsonl", *({"text": "a", "user": f"u{i % 7}"} for i in range(30)))
    assert len(read(path, 0, partition="natural:user").clients) == 7


@pytest.mark.parametrize(("row", "settings", "task", "kind", "columns"), [
    ({"text": "a", "id": 1}, {}, "auto", "text", ("text",)),
    ({"question": "a", "answer": "b"}, {}, "auto", "response", ("question", "answer")),
    ({"instruction": "a", "input": "", "output": "b"}, {}, "lm", "response", ("instruction", "output")),
    ({"instruction": "a", "input": "i", "output": "b"}, {}, "lm", "response", ("instruction", "input", "output")),
    ({"instruction": "a", "context": "c", "output": "b"}, {}, "auto", "response", ("instruction", "context", "output")),
    ({"context": "c", "question": "a", "answer": "b"}, {}, "auto", "response", ("context", "question", "answer")),
    ({"a": "x", "b": "y", "answer": "z"}, {"prompt": "b, a"}, "auto", "response", ("b", "a", "answer")),
    ({"system": "s", "question": "a", "answer": "b"}, {}, "auto", "response", ("system", "question", "answer")),
    ({"sentence1": "a", "sentence2": "b", "label": 1}, {}, "auto", "label", ("sentence1", "sentence2", "label")),
    ({"premise": "a", "hypothesis": "b", "label": 1}, {}, "auto", "label", ("premise", "hypothesis", "label")),
    ({"question": "a", "sentence": "b", "label": 1}, {}, "auto", "label", ("question", "sentence", "label")),
    ({"Text ": "a", "Label": 1}, {}, "auto", "label", ("Text ", "Label")),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
     {}, "auto", "chat", ("prompt", "completion")),
    ({"conversations": [{"from": "gpt", "value": "a"}], "system": "s"}, {}, "lm", "chat", ("system", "conversations")),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"response": "chosen"}, "auto", "response", ("prompt", "chosen")),
    ({"ask": "a", "output": "b", "text": "c"}, {"prompt": "ask"}, "auto", "response", ("ask", "output")),
    ({"text": "a", "label": 1}, {}, "auto", "label", ("text", "label")),
    ({"text": "a", "label": 1}, {}, "lm", "text", ("text",)),
    ({"text": "a", "kind": 1}, {"label": "kind"}, "auto", "label", ("text", "kind")),
    ({"question": "q", "answer": "a", "text": "t", "kind": 1}, {"label": "kind"}, "auto", "label", ("text", "kind")),
    ({"question": "q", "answer": "a", "kind": 1}, {"label": "kind"}, "lm", "response", ("question", "answer")),
    ({"a": "x", "b": "y", "label": 1}, {"text": ("a", "b")}, "classify", "label", ("a", "b", "label")),
    ({"img": "x.png", "label": 1}, {}, "image", "image", ("img", "label")),
    ({"messages": [{"role": "assistant", "content": "a"}], "text": "b"}, {}, "auto", "chat", ("messages",)),
])  # fmt: skip
def test_the_form_is_found_by_settings_and_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: Any,
    settings: Any,
    task: str,
    kind: str,
    columns: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (2, 2)).save("x.png")
    other = row | {name: 2 for name in ("label", "Label", "kind") if name in row}
    schema = read(jsonl(tmp_path / "x.jsonl", row, other), 2, task, **settings).schema
    assert (schema.kind, schema.columns) == (kind, columns)


@pytest.mark.parametrize(("found", "names"), [
    ([10, 9, -1], ("-1", "9", "10")),
    (["10", "9"], ("9", "10")),
    (["no", "Yes", "maybe"], ("Yes", "maybe", "no")),
    ([True, False], ("False", "True")),
])  # fmt: skip
def test_classes_stand_in_the_order_of_numbers_or_else_of_names(tmp_path: Path, found: Any, names: Any) -> None:
    assert read(jsonl(tmp_path / "x.jsonl", *({"text": "a", "label": x} for x in found))).schema.labels == names


def test_names_for_numbered_classes_can_be_given(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", *labelled(4))
    assert read(path, labels=("negative", "positive"), eval=path).schema.labels == ("negative", "positive")
    with pytest.raises(DataError, match=r'x\.jsonl line 2: label "1" is no class'):
        read(path, labels=("-1", "0"))


@pytest.mark.parametrize(("train", "other"), [(["a", "b"], "c"), (["a", "b"], 0), ([0, 1], -1)])
def test_a_label_that_training_does_not_have_is_found_in_the_evaluation(tmp_path: Path, train: Any, other: Any) -> None:
    path = jsonl(tmp_path / "x.jsonl", *({"text": "t", "label": x} for x in train))
    held = jsonl(tmp_path / "y.jsonl", {"text": "t", "label": train[0]}, {"text": "t", "label": other})
    with pytest.raises(DataError, match=rf'y\.jsonl line 2: label "{other}" is no class'):
        read(path, eval=held)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("x.jsonl", b'{"text": "a"}\n\n{"text" "b"}\n', r"x\.jsonl line 3: not JSON \(Expecting ':' delimiter at column 9"),
    ("x.jsonl", b'["a"]\n', r"x\.jsonl line 1: a list, and not an object"),
    ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r'x\.jsonl line 2: no column "text"; did you mean "txt"'),
    ("x.jsonl", b'{"text": "a"}\n{"text": null}\n', r'line 2: "text" is null; it takes text'),
    ("x.jsonl", b'{"text": "a", "label": {"a": 1}}\n', r'line 1: "label" is a dict; a label is'),
    ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl line 2: not UTF-8"),
    ("x.jsonl", b"\n\n", r"x\.jsonl has no examples"),
    ("x.jsonl", b'{"a": 1}\n', r"has the columns a, which do not say what to learn; set data\.text"),
    ("x.jsonl", b'{"text": "a", "label": 1}\n' * 2, r"two different classes, and has 1"),
    ("x.json", b'[{"text": "a"},\n {"text": }]', r"x\.json line 2: not JSON \(Expecting value at column 11\)"),
    ("x.json", b'[{"text": "a"}, 7]', r"x\.json row 2: a int, and not an object"),
    ("x.csv", b'text\n"a\nb"\nc,d\n', r"x\.csv line 4: 2 fields under a header of 1"),
    ("x.csv", b"text,label\nb\n", r"x\.csv line 2: 1 field under a header of 2; an empty field needs its comma too"),
    ("x.tsv", b"text\tlabel\na\t1\t2\n", r"x\.tsv line 2: 3 fields under a header of 2; put a field with a tab in it"),
    ("x.csv", b'text\n"a\n', r"x\.csv line 2: not CSV .*; close its quote"),
    ("x.csv", b"text,text\na,b\n", r"x\.csv line 1: two columns have the same name"),
    ("x.csv", b"text,label\na,1\nb,\n", r'x\.csv line 3: "label" is empty'),
    ("x.csv", b"text\n", r"x\.csv has no examples"),
    ("x.csv", b"", r"x\.csv has no examples"),
    ("x.parquet", b"PAR1", r"x\.parquet cannot be read as Parquet"),
    ("x.xlsx", b"", r"x\.xlsx: what kind of file .* known are \.jsonl, .*\.json, \.csv, .*\.parquet"),
])  # fmt: skip
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("messages", "says"), [
    ([{"role": "user", "content": "a"}], "has no assistant's turn"),
    ([{"speaker": "gpt", "content": "a"}], 'has a message, number 1, without "role"'),
    ([{"from": "gpt", "text": "a"}], 'has a message, number 1, without "value"'),
    ([{"role": "assistent", "content": "a"}], 'number 1, of the role "assistent"; did you mean "assistant"'),
    ([{"role": "assistant", "content": None}], 'has a message, number 1, without "content"'),
    ("hello", "is no list of messages"),
    ([], "is no list of messages"),
])  # fmt: skip
def test_a_malformed_conversation_is_named_with_its_line(tmp_path: Path, messages: Any, says: str) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=rf'line 2: "messages" .*{says}'):
        read(jsonl(tmp_path / "x.jsonl", good, {"messages": messages}))


def test_files_must_agree_on_the_columns_that_are_used(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "a", "more": 1})
    jsonl(tmp_path / "b.jsonl", {"sentence": "a"})
    with pytest.raises(DataError, match=r'b\.jsonl line 1: no column "text"'):
        read(str(tmp_path), 0)


def test_a_site_without_a_word_is_told_of_and_no_other_is_refused(tmp_path: Path) -> None:
    """The client with that file fails alone; where all are so, nothing begins."""
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    empty = jsonl(tmp_path / "b.jsonl", {"text": ""}, {"text": " "})
    says = f'{empty}: "text" is empty in all 2 rows: there is nothing to learn'
    assert read(str(tmp_path), 0).warnings == (says,)
    with pytest.raises(DataError, match=r'b\.jsonl: "text" is empty in all 2 rows'):
        read(empty, 1)


@pytest.mark.parametrize("files", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_the_order_of_the_files_does_not_change_what_the_columns_mean(tmp_path: Path, files: tuple[str, ...]) -> None:
    rows = {"a": {}, "b": {"input": ""}, "c": {"input": "i"}}
    for n, name in enumerate(files):
        jsonl(tmp_path / f"{n}.jsonl", {"instruction": "q", "output": "o", **rows[name]})
    assert read(str(tmp_path), 0).schema.columns == ("instruction", "input", "output")


def test_files_whose_other_columns_differ_are_pooled_all_the_same(tmp_path: Path) -> None:
    from datasets import Dataset

    for name, ids in (("a", [1, 2]), ("b", ["x", "y"])):
        Dataset.from_dict({"text": ["u", "v"], "id": ids}).to_parquet(tmp_path / f"{name}.parquet")
    federated = read(str(tmp_path), 2, partition="iid")
    assert sorted(row["text"] for rows in federated.clients for row in rows) == ["u", "u", "v", "v"]


def test_a_column_that_does_not_exist_is_corrected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no column "sentense1", as data\.text has it; did you mean "sentence1"\?'):
        read(jsonl(tmp_path / "x.jsonl", *labelled(4)), text=("sentense1",))


@pytest.mark.parametrize(("task", "says"), [("classify", r"data\.text and data\.label"), ("image", r"data\.image")])
def test_a_task_that_the_columns_do_not_allow_is_refused(tmp_path: Path, task: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.task = {task} does not go with the data: .* set {says}"):
        read(jsonl(tmp_path / "x.jsonl", {"text": "a"}), 1, task)


def test_a_missing_file_is_corrected_to_one_that_is_there(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r'trian\.jsonl: there is no such file or folder; did you mean "train\.jsonl"'):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="holds no data"):
        read(str(tmp_path / "test_*.jsonl"))


def test_more_clients_than_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 examples cannot be shared among 5 clients; ask for 1 to 4"):
        read(jsonl(tmp_path / "x.jsonl", *labelled(4)), 5)


def test_a_line_separator_inside_a_string_and_a_byte_order_mark_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('\ufeff{"text": "a\u2028b"}\r\n'.encode())
    assert read(str(tmp_path / "x.jsonl"), 1).clients[0][0] == {"text": "a\u2028b"}


def test_parquet_and_a_saved_dataset_are_read_as_what_they_were(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}, features=features)
    rows.to_parquet(tmp_path / "x.parquet")
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    for name in ("x.parquet", "one", "two"):
        federated = read(str(tmp_path / name), 2, eval=f"{tmp_path}/two:test", holdout=0.5)
        assert federated.schema.labels == ("ham", "spam")
        assert everything(federated)[:2] == [{"text": "a", "label": 0}] * 2
    with pytest.raises(DataError, match='two has no split "tset"; did you mean "test"'):
        read(f"{tmp_path}/two:tset")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_id_that_cannot_be_had_is_one_sentence_soon(offline: str) -> None:
    code = f"{IMPORT}; load(DataConfig(path='nobody/nothing-at-all'), 'auto', clients=0, seed=0)"
    environment = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert time.perf_counter() - begin < 25
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: nobody/nothing-at-all is no file or folder here, and could not be had as a hub id" in last


def test_sst2_is_six_clients_of_their_own_sizes(real_data: Path) -> None:
    folder = real_data / "sst2"
    federated = read(str(folder / "client_*.jsonl"), 0, eval=str(folder / "val.jsonl"))
    assert [len(rows) for rows in federated.clients] == [14812, 7586, 17169, 17237, 5728, 4811]
    assert (federated.schema.kind, federated.schema.columns) == ("label", ("sentence1", "label"))
    assert len(federated.evaluation) == 872


def test_gsm8k_is_questions_and_answers(real_data: Path) -> None:
    folder = real_data / "gsm8k"
    federated = read(str(folder / "train.jsonl"), 0, eval=str(folder / "test.jsonl"))
    assert federated.schema.columns == ("question", "answer")
    assert sum(map(len, federated.clients)) == 7473
    assert {len(rows) for rows in federated.clients} == {149, 150}


@pytest.mark.parametrize(("row", "task", "says"), [
    ({"complaint": "my card is lost", "category": "card"}, "auto", "--data.text complaint --data.label category"),
    ({"file": "x/1.png", "finding": "normal"}, "auto", "--data.image file --data.label finding"),
    ({"note": "a long text", "kind": 1}, "classify", "--data.text note --data.label kind"),
])  # fmt: skip
def test_columns_of_unusual_names_are_named_in_the_remedy(tmp_path: Path, row: Any, task: str, says: str) -> None:
    rows = [{key: f"{value}" if key in ("file", "note") else value for key, value in row.items()} for _ in range(4)]
    for i, one in enumerate(rows):
        one["id"] = i
        one[list(row)[-1]] = f"{list(row.values())[-1]}{i % 2}"
    with pytest.raises((ConfigError, DataError), match=f'is it "{says}"'):
        read(jsonl(tmp_path / "x.jsonl", *rows), 1, task)
