"""JSON, CSV and TSV as people write them, and what is said of those that are no table."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.sources import read_tables
from fedlora.data.text_files import read_csv, read_jsonl
from fedlora.errors import DataError


def read(path: Path, content: str | bytes) -> list[dict[str, Any]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    [table] = read_tables(str(path), 0)
    return [dict(row) for row in table.rows]


DEEP = '{"text": "w", "note": ' + "[" * 50_000 + "]" * 50_000 + "}\n"


@pytest.mark.parametrize(("name", "content", "says"), [
    ("x.jsonl", '{"text": "a"}\n' + DEEP, r"x\.jsonl line 2: JSON that is nested too deeply"),
    ("x.json", "[" + DEEP + "]", r"x\.json line 1: JSON that is nested too deeply"),
    ("x.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", r"x\.jsonl line 1: cannot be read as JSON \(Exceeds"),
    ("x.jsonl", '{"text": "a", "text": "b"}', r'line 1: cannot be read as JSON \("text" stands twice in one object'),
    ("x.jsonl", '{\n  "text": "a"\n}\n', r"x\.jsonl line 1: an object that goes on in the next line; write one object"),
    ("x.jsonl", '[{"text": "a"}]', r"line 1: a list, and not an object with columns; .* in a file that ends in \.json"),
    ("x.json", '{\n  "data": [\n{"text": "a"}]}', r'x\.json: an object, not .* its "data" is a list: save'),
    ("x.json", '{"data": [{"text": "a"}]}', r'x\.json: an object, not .* its "data" is a list: save'),
    ("x.json", '{"text": {"0": "a"}, "label": {"0": 1}}', r"x\.json: an object, not .*; write one object a row"),
    ("x.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', r"x\.json line 4: not JSON \(Extra .*; write one object a line"),
    ("x.json", '{\n"text": "a",\n"label" 1}', r"x\.json line 3: not JSON"),
    ("x.csv", "text;label\na, b;1\n", r'x\.csv line 1: one column, "text;label": is the separator ";"\?'),
    ("x.csv", 'text;label\n"a; b, c";1\n', r'x\.csv line 1: one column, "text;label": is the separator ";"\?'),
    ("x.json", '{"train": [{"text": "a"}], "test": [{"text": "a"}]}', r'its "train" and "test" are lists: save each'),
    ("x.csv", "text\tlabel\na\t1\n", r"x\.csv line 1: one column, .* is the separator a tab\?"),
    ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid s\n", r"x\.jsonl is a pointer of Git LFS, .*pull"),
    ("x.tsv", "text,label\na,1\n", r'x\.tsv line 1: one column, "text,label": is the separator ","\?'),
])  # fmt: skip
def test_what_is_no_table_is_said_with_the_remedy(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path / name, content)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_one_row_in_a_json_file_is_a_row(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    assert read(tmp_path / "x.json", json.dumps(chat)) == [chat]
    assert read(tmp_path / "x.json", '{"text": "a"}\n{"text": "b"}\n') == [{"text": "a"}, {"text": "b"}]


def test_fields_with_tabs_between_them_are_read(tmp_path: Path) -> None:
    assert read(tmp_path / "x.tsv", "sentence\tlabel\na, b\t1\n") == [{"sentence": "a, b", "label": "1"}]


def test_a_blank_after_every_comma_belongs_to_the_comma(tmp_path: Path) -> None:
    assert read(tmp_path / "x.csv", 'text, label\n"a, b", pos\nc,neg\n') == [
        {"text": "a, b", "label": "pos"},
        {"text": "c", "label": "neg"},
    ]


OPEN = 'w1{0}a\n"w2{0}b\nw3{0}a\nw4{0}b\nw5"{0}a\nw6{0}b\n'


@pytest.mark.parametrize(("ending", "separator"), [(".tsv", "\t"), (".csv", ",")])
def test_a_quote_that_closes_rows_later_is_told(tmp_path: Path, ending: str, separator: str) -> None:
    """As in files that know no quotes, where one may stand at the beginning of a text and another at an end."""
    path = tmp_path / f"x{ending}"
    path.write_text(f"text{separator}label\n" + OPEN.format(separator))
    [table] = read_tables(str(path), 0)
    assert len(table.rows) == 3
    assert table.warnings[0].startswith(f"{path} line 3: a quote that opens here closes 3 lines further on, over what")


@pytest.mark.parametrize("text", ["Dear John,\nthank you", "a, b\nc, d\ne", "one\ntwo\nthree", "a,b,c\n1,2,3"])
def test_a_text_of_several_lines_is_no_such_quote(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f'text,label\n"{text}",pos\nw,neg\n')
    [table] = read_tables(str(path), 0)
    assert not table.warnings and table.rows[0]["text"] == text


def test_a_field_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    [row] = read(tmp_path / "x.csv", f"text\n{'w' * 200_000}\n")
    assert len(row["text"]) == 200_000


def test_half_an_emoji_is_replaced_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud83d b", "k": "\\ud83d\\ude00 \\\\ud83d"}\n')
    table = read_jsonl(path)
    assert table.rows[1] == {"text": "\ufffd b", "k": "\U0001f600 \\ud83d"}
    assert table.warnings == (f"{path} line 2 has half of a character, as of an emoji that was cut in two, which is "
                              "replaced by U+FFFD",)  # fmt: skip


@given(
    rows=st.lists(st.dictionaries(st.text(min_size=1), st.text(st.characters(), max_size=20), max_size=4), max_size=4)
)
def test_any_text_that_json_can_write_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    """Halves of characters aside, whatever is escaped."""
    path = tmp_path_factory.mktemp("rows") / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for found, row in zip(read_jsonl(path).rows, rows, strict=True):
        for key, value in row.items():
            whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert found[key.encode("utf-16", "surrogatepass").decode("utf-16", "replace")] == whole


@given(
    rows=st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))), min_size=1)
)
def test_any_fields_that_csv_can_write_are_read_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    import csv

    path = tmp_path_factory.mktemp("rows") / "x.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    assert [(row["text"], row["label"]) for row in read_csv(path).rows] == rows
