"""What a label column holds: classes, numbers, or several labels, in whatever form a file has them."""

from decimal import Decimal
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.schema import Schema
from fedlora.data.sources import Table
from fedlora.data.targets import as_lists, encoded_target, gathered, number, with_target, wrong_class, wrong_target
from fedlora.errors import DataError
from fedlora.sections import DataConfig

SCHEMA = Schema("label", ("text", "label"))
SEVERAL = Schema("label", ("text", "label"), target="labels")


def table(*labels: Any) -> Table:
    return Table("some.jsonl", [{"text": "a", "label": label} for label in labels])


@pytest.mark.parametrize(
    ("labels", "target"),
    [
        ((1, 0, 1), "class"),
        ((1.0, 2.0), "class"),
        (("1", "2"), "class"),
        (("no", "yes"), "class"),
        (("3", "n/a", "4"), "class"),
        (("3.5", "n/a", "4", "5"), "number"),
        (("a3.5", "n/a", "4.5"), "class"),
        ((True, False), "class"),
        ((1, 2.5), "number"),
        (("1", "2.5", "-1e-3"), "number"),
        ((["a"], ["a", "b"]), "labels"),
        (([], [1, 2]), "labels"),
    ],
)
def test_a_column_says_by_its_values_what_it_holds(labels: tuple[Any, ...], target: str) -> None:
    assert with_target(SCHEMA, [table(*labels)], DataConfig(), "auto").target == target


def test_numbers_that_are_named_as_classes_are_classes() -> None:
    assert with_target(SCHEMA, [table(0.5, 1.5)], DataConfig(labels=("0.5", "1.5")), "auto").target == "class"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_the_same_as_text(value: float) -> None:
    assert number(value) == number(repr(value)) == value


def test_a_float_without_a_fraction_is_the_class_of_that_whole_number() -> None:
    schema = Schema("label", ("text", "label"), ("0", "1"))
    assert [encoded_target(schema, {"label": value}).tolist() for value in (1, 1.0, "1")] == [1, 1, 1]
    assert wrong_class(1.0) == "" and "model.task = regression" in wrong_class(1.5)
    assert "model.task = multilabel" in wrong_class(["a"])


def test_a_decimal_of_a_database_is_a_number() -> None:
    assert number(Decimal("3.50")) == 3.5


@pytest.mark.parametrize("value", ["", "nan", "inf", "1,5", "1_000", "high", None, True, float("nan"), [1.0], "0x1"])
def test_what_is_no_number_is_refused(value: Any) -> None:
    schema = Schema("label", ("text", "label"), target="number")
    assert number(value) is None and "a regression takes numbers" in wrong_target(schema, value)


FORMS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "names": ([["a", "c"], [], ["b"]], {}),
    "a name twice": ([["a", "c", "a"], [], ["b"]], {}),
    "text": (["a; c", "", "b"], {"separator": ";"}),
    "a list as text": (["['a', 'c']", "[]", '["b"]'], {}),
}


@pytest.mark.parametrize(("cells", "options"), FORMS.values(), ids=FORMS)
def test_several_labels_are_the_same_in_every_form(cells: list[Any], options: dict[str, Any]) -> None:
    schema = Schema("label", ("text", "label"), ("a", "b", "c"), target="labels", **options)
    [listed], _ = as_lists([table(*cells)], schema, schema.labels)
    assert [encoded_target(schema, row).tolist() for row in listed.rows] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("one", [1, 1.0, True])
def test_a_list_with_a_one_for_each_label_names_these(one: Any) -> None:
    zero = type(one)(0)
    [listed], known = as_lists([table([one, zero, one], [zero, zero, zero])], SEVERAL, ())
    assert known == ("0", "1", "2")
    assert [row["label"] for row in listed.rows] == [["0", "2"], []]


def test_numbers_of_labels_mean_what_their_own_file_says() -> None:
    tables = [hub(names, numbers) for names, numbers in ((["a", "b"], [[0], [0, 1]]), (["b", "a"], [[1], [0, 1]]))]
    listed, known = as_lists(tables, SEVERAL, ())
    assert known == ("a", "b")
    assert [list(map(set, t.rows["label"])) for t in listed] == [[{"a"}, {"a", "b"}]] * 2  # type: ignore[call-overload]


def hub(names: list[str], numbers: list[list[int]]) -> Table:
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=names))})
    return Table("hub", Dataset.from_dict({"text": ["x"] * len(numbers), "label": numbers}, features=features))


@pytest.mark.parametrize("flags", [[0, 1], ["0", "1"], [False, True], [0.0, 1.0]], ids=str)
def test_a_column_for_each_label_makes_one_of_lists(flags: list[Any]) -> None:
    no, yes = flags
    rows = [{"text": "x", "toxic": yes, "rude": no}, {"text": "y", "toxic": no, "rude": no}]
    got = gathered(Table("jigsaw.csv", rows), ("toxic", "rude"))
    assert [row["labels"] for row in got.rows] == [["toxic"], []]


def test_a_column_of_a_labels_own_that_has_something_else_is_refused_with_its_place() -> None:
    rows = [{"text": "x", "toxic": 0, "rude": 1}, {"text": "y", "toxic": "maybe", "rude": 0}]
    with pytest.raises(DataError, match=r'jigsaw.csv .*2: "toxic" is \'maybe\'; a column of a label\'s own has 0 or 1'):
        gathered(Table("jigsaw.csv", rows), ("toxic", "rude"))


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, [["a"]], "a,b"])
def test_what_is_no_list_of_labels_is_refused(value: Any) -> None:
    assert "several labels are a list" in wrong_target(SEVERAL, value)
