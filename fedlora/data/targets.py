"""What the label column holds: one class of several, a number, or any of several labels."""

import re
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import chain
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import ConfigError, DataError
from fedlora.sections import DataConfig

from .rows import Rows, column
from .schema import Schema, Target
from .tables import Table

GATHERED = "labels"  # the column of labels that several columns of 0 and 1 make
BY_TASK: dict[str, Target] = {"regression": "number", "multilabel": "labels", "classify": "class"}
FLAGS = {0: False, 1: True, "0": False, "1": True}  # what a column of a label's own may hold; True == 1 and 1.0 == 1
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def gather(tables: list[Table], data: DataConfig, task: str) -> tuple[list[Table], DataConfig]:
    """The tables with one column of labels instead of a column of 0 and 1 for each, and the settings that name it.

    So it is where every name in data.labels is a column, and no other column is said to hold the label.
    """
    has_all = all({*data.labels} <= {*table.columns} for table in tables)
    if task not in ("auto", "multilabel") or data.label or not (data.labels and has_all):
        return tables, data
    if any(GATHERED in table.columns for table in tables):
        return tables, data
    return [gathered(table, data.labels) for table in tables], replace(data, label=GATHERED)


def gathered(table: Table, names: Sequence[str]) -> Table:
    """The table with a column of labels made of several columns of 0 and 1, if it has one for each of these names.

    Raises `DataError` for the first row that has another value in one of them.
    """
    if not names or not {*names} <= {*table.columns} or GATHERED in table.columns:
        return table
    flags = zip(*(_flags(table, name) for name in names), strict=True)
    labels = [[name for name, flag in zip(names, row, strict=True) if flag] for row in flags]
    return _with_column(table, GATHERED, labels)


def _flags(table: Table, name: str) -> list[bool]:
    """The values of a column of a label's own; raises `DataError` for the first that is neither 0 nor 1."""
    values = column(table.rows, name)
    for i, value in enumerate(values):
        if not _is_flag(value):
            raise DataError(
                f'{table.location(i)}: "{name}" is {str(value)[:40]!r}; a column of a label\'s own has 0 or 1'
            )
    return [FLAGS[value] for value in values]


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float | str) and value in FLAGS


def _with_column(table: Table, name: str, values: Sequence[Sequence[str]]) -> Table:
    """The table with this column of lists of names, in the place of one of the same name."""
    if not hasattr(table.rows, "column_names"):
        rows = [{**row, name: value} for row, value in zip(table.rows, values, strict=True)]
        return replace(table, rows=rows)
    from datasets import List, Value

    dataset: Any = table.rows
    rest = dataset.remove_columns([name]) if name in dataset.column_names else dataset
    return replace(table, rows=rest.add_column(name, list(values), feature=List(Value("string"))))


def with_target(schema: Schema, tables: Sequence[Table], data: DataConfig, task: str) -> Schema:
    """The schema with what its label column holds: as model.task says, or else by a look at the column.

    Lists are several labels, and a column of numbers of which one has a fraction holds numbers; all else is a class, as
    are numbers that data.labels names.
    """
    if schema.label_column is None:
        return schema
    target = BY_TASK.get(task) or ("class" if task == "image" else _likeliest(tables, schema, data))
    return replace(schema, target=target, separator=data.label_separator if target == "labels" else "")


def _likeliest(tables: Sequence[Table], schema: Schema, data: DataConfig) -> Target:
    values = list(chain.from_iterable(_column(table, schema) for table in tables))
    if any(isinstance(value, list | tuple) for value in values) or data.label_separator:
        return "labels"
    return "number" if not data.labels and _have_a_fraction(values) else "class"


def _have_a_fraction(values: Sequence[Any]) -> bool:
    """Are most of these numbers, of which one is not whole? The others are then mistakes, and are told as such."""
    found = [x for x in map(number, values) if x is not None]
    return 2 * len(found) > len(values) and any(not x.is_integer() for x in found)


def _column(table: Table, schema: Schema) -> list[Any]:
    """The label column's values; none where a table lacks it, which is an error that is told later."""
    return column(table.rows, schema.columns[-1]) if schema.columns[-1] in table.columns else []


def number(value: Any) -> float | None:
    """The finite number that a value is or writes, as 3.5 and "3.5"; none for anything else."""
    if isinstance(value, str):
        value = float(value) if NUMBER.fullmatch(value.strip()) else None
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return float(value) if is_number and isfinite(value) else None


def class_name(value: Any) -> str:
    """A class as it is called: a float without a fraction, as pandas writes whole numbers, is that whole number."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else str(value)


def wrong_class(value: Any) -> str:
    """The reason to refuse a value as a class, to follow the column's name; empty for none."""
    if (isinstance(value, int | str) and value != "") or (isinstance(value, float) and value.is_integer()):
        return ""
    remedy = ""
    if isinstance(value, float):
        remedy = "; a regression takes numbers: model.task = regression"
    if isinstance(value, list | tuple):
        remedy = "; model.task = multilabel takes several labels"
    return f"is {type_in_words(value)}; a label is a whole number or a name{remedy}"


def type_in_words(value: Any) -> str:
    """The type of a value in the words of an error: "null", "empty", "an int", "a list"."""
    if value is None:
        return "null"
    if value == "":
        return "empty"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def numbers_of(rows: Rows, schema: Schema) -> list[float]:
    """The numbers that a regression learns of these rows; none for other data."""
    if schema.target != "number" or not len(rows):
        return []
    return [x for x in map(number, column(rows, schema.columns[-1])) if x is not None]


def wrong_target(schema: Schema, value: Any) -> str:
    """The reason to refuse a value of a number or of several labels, to follow the column's name; empty for none."""
    if schema.target == "number":
        if number(value) is not None:
            return ""
        return f"is {_short(value)}; a regression takes numbers, as 3.5; model.task = classify takes names"
    if isinstance(value, str) and not schema.separator and not _written_list(value):
        return (
            f"is the text {_short(value)}, and several labels are a list; set data.label_separator to what stands "
            "between them"
        )
    if not isinstance(value, str | list | tuple):
        return f"is {_short(value)}; several labels are a list of names"
    if isinstance(value, list | tuple) and not all(isinstance(label, str | int | float) for label in value):
        return f"is {_short(value)}; several labels are a list of names, and no list of lists"
    return ""


def _short(value: Any) -> str:
    return "null" if value is None else repr(value)[:40]


def as_lists(tables: Sequence[Table], schema: Schema, names: Sequence[str]) -> tuple[list[Table], tuple[str, ...]]:
    """The tables with several labels as lists of their names, and the names of all labels where the data say them.

    A list may have names, or the numbers of names that datasets has written down, or a 0 or 1 for each label; a text
    has labels between separators, or is a list as Python or JSON writes it. `names` are the known labels, in order.
    """
    wide = _flag_count(tables, schema)
    if wide and names and len(names) != wide:
        raise ConfigError(
            f"data.labels has {len(names)} names, and {tables[0].name} a 0 or 1 for each of {wide} labels"
        )
    known = tuple(names) or (tuple(map(str, range(wide))) if wide else _written_names(tables, schema))
    listed = []
    for table in tables:
        own = _names_of(table, schema)
        cells = [_cell(value, schema.separator) for value in _column(table, schema)]
        labels = [_flagged(cell, known) if wide else _named(cell, own) for cell in cells]
        listed.append(_with_column(table, schema.columns[-1], labels))
    return listed, known


def _cell(value: Any, separator: str) -> list[Any]:
    """The labels in a cell as a list; those of a text are what stands between separators."""
    if not isinstance(value, str):
        return list(value)
    listed = _written_list(value)
    if listed is not None:
        return listed
    parts = value.split(separator) if separator else [value]
    return [part.strip() for part in parts if part.strip()]


def _written_list(text: str) -> list[Any] | None:
    """The list that a text is, as Python or JSON writes one of names; none for another text."""
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        return None
    try:
        found = literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(x, str | int) for x in found) else None


def _flag_count(tables: Sequence[Table], schema: Schema) -> int:
    """How many labels have a 0 or 1 in every list; 0 where lists hold the labels themselves.

    Lists of 0 and 1, all of one length, are flags where one of them has a value twice: no list of labels has.
    """
    cells = [_cell(v, schema.separator) for v in chain.from_iterable(_column(table, schema) for table in tables)]
    lengths = {len(cell) for cell in cells}
    repeats = any(len(set(cell)) < len(cell) for cell in cells)
    are_flags = len(lengths) == 1 and repeats and all(map(_is_number_flag, chain.from_iterable(cells)))
    return lengths.pop() if are_flags else 0


def _is_number_flag(value: Any) -> bool:
    return _is_flag(value) and not isinstance(value, str)


def _flagged(cell: Sequence[Any], names: Sequence[str]) -> list[str]:
    return [name for name, flag in zip(names, cell, strict=True) if flag]


def _named(cell: Sequence[Any], names: Mapping[Any, str]) -> list[str]:
    """The names of the labels in a cell, each once."""
    return list(dict.fromkeys(names.get(label, str(label)) for label in cell))


def _names_of(table: Table, schema: Schema) -> dict[Any, str]:
    """The names that a table has written down for the numbers of its labels."""
    feature = getattr(table.rows, "features", {}).get(schema.columns[-1])
    names = getattr(getattr(feature, "feature", None), "names", None) or ()
    return dict(enumerate(names))


def _written_names(tables: Sequence[Table], schema: Schema) -> tuple[str, ...]:
    """The names of labels that the tables have written down; none if one of the tables has none."""
    names = [_names_of(table, schema).values() for table in tables]
    return tuple(dict.fromkeys(chain.from_iterable(names))) if all(names) else ()


def encoded_target(schema: Schema, row: Mapping[str, Any]) -> Tensor:
    """What a model is to learn of a row: its class's number (), its number (), or a 0 or 1 for each label (labels,)."""
    value = row[schema.columns[-1]]
    if schema.target == "number":
        return torch.tensor(number(value), dtype=torch.float32)
    classes = schema.classes()
    if schema.target == "class":
        return torch.tensor(classes[class_name(value)])
    there = {classes[str(label)] for label in value}
    return torch.tensor([float(i in there) for i in range(len(schema.labels))])


def made_up_target(schema: Schema, i: int) -> Any:
    """A value for the label column of the i-th made-up row."""
    made: dict[Target, Any] = {"number": i % 3 - 1.5, "labels": list(schema.labels[: i % (len(schema.labels) + 1)])}
    return made[schema.target] if schema.target != "class" else schema.labels[i % len(schema.labels)]
