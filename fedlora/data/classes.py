"""The classes of labelled data: their names and order, and the labels of every table in these names."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from fedlora.errors import DataError, cut, nearest

from .rows import Rows, column
from .schema import Schema, is_whole
from .tables import Table
from .targets import class_name


def class_names(tables: Sequence[Table], schema: Schema, chosen: Sequence[str]) -> Schema:
    """The schema with the names of its classes in their order.

    They are the `chosen` ones of the settings; or those that the schema has already, or that the tables have written
    down, as datasets does; or those that are found. Raises `DataError` for fewer than two classes, or of several labels
    for none.
    """
    names = tuple(chosen) or schema.labels or _written_down(tables, schema) or _found(tables, schema)
    fewest = 1 if schema.target == "labels" else 2
    if len(set(names)) < max(fewest, len(names)):
        raise DataError(
            f"{tables[0].name}: a classifier needs two different classes, and has {', '.join(map(cut, names[:5]))}; "
            f'is "{schema.label_column}" the column of the classes? data.label names another'
        )
    return replace(schema, labels=names)


def _written_down(tables: Sequence[Table], schema: Schema) -> tuple[str, ...]:
    """The classes that datasets has written down with the tables; none if one of the tables has plain labels."""
    names = [written_names(table.rows, schema) for table in tables]
    return tuple(dict.fromkeys(chain.from_iterable(names))) if all(names) else ()


def written_names(rows: Rows, schema: Schema) -> tuple[str, ...]:
    """The names that the integers of a `ClassLabel` column stand for; none for plain labels.

    None too where all of them are unknown to the schema: then data.labels gives the classes new names, in their order.
    """
    feature = getattr(rows, "features", {}).get(schema.label_column)
    names = tuple(getattr(feature, "names", None) or ())
    return names if not schema.labels or {*names} & {*schema.labels} else ()


def _found(tables: Sequence[Table], schema: Schema) -> tuple[str, ...]:
    """The classes that occur in the data, in order: numbers by size, names by the alphabet."""
    found = sorted(labels_in(tables, schema))
    return tuple(sorted(found, key=int) if all(map(is_whole, found)) else found)


def labels_in(tables: Sequence[Table], schema: Schema) -> set[str]:
    """The labels as they are called in the data."""
    labels = chain.from_iterable(labels_of(table.rows, schema) for table in tables)
    return set(chain.from_iterable(labels))


def labels_of(rows: Rows, schema: Schema) -> list[tuple[str, ...]]:
    """The labels of every row as they are called: by the names that its own table has written down, or as they stand.

    They are one or several by `schema.target`, and none where the data have no classes.
    """
    if schema.label_column is None or schema.target == "number" or not len(rows):
        return []
    values = column(rows, schema.label_column)
    if schema.target == "labels":
        return [tuple(map(str, value)) for value in values]
    names = dict(enumerate(written_names(rows, schema)))
    return [(names.get(value, str(value)) if names else class_name(value),) for value in values]


def class_counts(rows: Rows, schema: Schema) -> Counter[str]:
    """How many of these rows each class has, by its name; nothing for data without classes."""
    numbers = schema.classes() if schema.labels else {}
    labels = chain.from_iterable(labels_of(rows, schema) if numbers else [])
    return Counter(schema.class_order[numbers[label]] for label in labels)


def with_names(tables: Sequence[Table], schema: Schema) -> list[Table]:
    """The tables with their labels as names, if the integers of one of them are not the schema's class numbers."""
    if all(_are_class_numbers(table.rows, schema) for table in tables):
        return list(tables)
    return [_renamed(table, schema) if written_names(table.rows, schema) else table for table in tables]


def _are_class_numbers(rows: Rows, schema: Schema) -> bool:
    """Does every integer that the table has a name for stand for that name in the schema too?"""
    numbers = schema.classes()
    return all(numbers.get(str(i)) == numbers.get(name, i) for i, name in enumerate(written_names(rows, schema)))


def _renamed(table: Table, schema: Schema) -> Table:
    from datasets import Value

    rows: Any = table.rows
    labels = list(chain.from_iterable(labels_of(table.rows, schema)))
    rest = rows.remove_columns(schema.label_column)
    return replace(table, rows=rest.add_column(schema.label_column, labels, feature=Value("string")))


def check_labels(table: Table, schema: Schema, known: Container[str]) -> None:
    """Raise `DataError` for the first row whose class is not known; data without classes pass."""
    for i, labels in enumerate(labels_of(table.rows, schema)):
        for label in labels:
            if label not in known:
                raise DataError(
                    f'{table.location(i)}: label "{cut(label)}" is no class of the training data or of data.labels; '
                    f"{nearest(label, schema.labels)}"
                )
