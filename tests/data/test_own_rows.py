"""Rows that a caller holds in memory: what counts as such, and that a run reads what was given."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from pandas import DataFrame
from PIL import Image

from fedlora.data.own_rows import is_rows, write_rows
from fedlora.data.sources import read_tables
from fedlora.errors import ConfigError, DataError

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1, "more": "only here"}]
WHOLE = [{"more": None, **row} for row in ROWS]


@pytest.mark.parametrize("kind", [list, tuple, DataFrame, Dataset.from_list], ids=["list", "tuple", "frame", "dataset"])
def test_a_table_is_read_back_as_it_was_given(kind: Any, tmp_path: Path) -> None:
    given = kind(ROWS)
    assert is_rows(given)
    [table] = read_tables(str(write_rows(given, tmp_path, "data")), 0)
    assert [row["text"] for row in table.rows] == ["a", "b"] and [row["label"] for row in table.rows] == [0, 1]


def test_a_column_that_the_first_row_lacks_is_kept(tmp_path: Path) -> None:
    [table] = read_tables(str(write_rows(ROWS, tmp_path, "data")), 0)
    assert [dict(row) for row in table.rows] == WHOLE


@pytest.mark.parametrize("clients", [[ROWS, DataFrame(ROWS)], {"hospital a": ROWS, "hospital b": ROWS[:1]}])
def test_several_tables_are_a_file_each(clients: Any, tmp_path: Path) -> None:
    tables = read_tables(str(write_rows(clients, tmp_path, "data")), 0)
    assert [len(table.rows) for table in tables] == [
        len(part) for part in getattr(clients, "values", clients.__iter__)()
    ]


def test_twelve_clients_stand_in_their_order(tmp_path: Path) -> None:
    given = [[{"text": str(i)}] for i in range(12)]
    tables = read_tables(str(write_rows(given, tmp_path, "data")), 0)
    assert [table.rows[0]["text"] for table in tables] == [str(i) for i in range(12)]


def test_images_and_conversations_are_kept(tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    [table] = read_tables(str(write_rows(talk, tmp_path, "talk")), 0)
    assert table.rows[0]["messages"] == talk[0]["messages"]
    [table] = read_tables(str(write_rows([{"image": Image.new("RGB", (3, 2)), "label": 1}], tmp_path, "seen")), 0)
    assert table.rows[0]["image"]["bytes"][:4] == b"\x89PNG"


def test_only_their_owner_can_read_them(tmp_path: Path) -> None:
    path = write_rows(ROWS, tmp_path / "given", "data")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("other", ["train.jsonl", 3, [], {}, ["a"], {"path": "x"}, {"text": ["a", "b"]}, [1, 2]])
def test_other_values_are_no_rows(other: Any) -> None:
    assert not is_rows(other)


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ([{"text": "a"}, {"text": 5}], DataError, "data: its rows cannot be kept as a table: "),
        ({"../x": ROWS}, DataError, 'a client called "../x"'),
        (
            DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)),
            ConfigError,
            "has splits, train, te",
        ),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(rows: Any, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says) as caught:
        write_rows(rows, tmp_path, "data")
    assert "\n" not in str(caught.value)
