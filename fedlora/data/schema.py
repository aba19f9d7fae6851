"""Which columns of a table hold texts, labels, images or conversations, and whether their values can be used."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from fedlora.errors import ConfigError, DataError, nearest
from fedlora.sections import DataConfig

from .rows import column
from .sources import Table

TEXT = ("text", "sentence", "sentence1", "content", "review", "utterance")
LABEL = ("label", "category", "labels", "intent", "target", "class")
IMAGE = ("image", "img")
CHAT = ("messages", "conversations")
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
KINDS = {  # by model.task
    "lm": ("chat", "response", "text"),
    "seq2seq": ("response",),
    "classify": ("label",),
    "image": ("image",),
}
NEEDS = {"lm": "data.text, data.messages, or data.prompt and data.response", "classify": "data.text and data.label"}
NEEDS |= {"image": "data.image and data.label", "seq2seq": "data.prompt and data.response"}
Target = Literal["class", "number", "labels"]  # one class of several, a number, or any of several labels
MOST_COLUMNS = {"chat": 1, "response": 2, "image": 2, "label": 3, "text": 1}  # that a kind can have


@dataclass(frozen=True)
class Schema:
    """The meaning of a table's columns, by which rows become examples."""

    kind: Literal["text", "response", "chat", "label", "image"]
    columns: tuple[str, ...]  # (text,), (prompt, response), (messages,), (text[, text2], label) or (image, label)
    labels: tuple[str, ...] = ()  # class names in order, of "label" and "image"
    target: Target = "class"  # what the label column holds, of "label" and "image"
    template: Literal["auto", "chat", "plain"] = "auto"  # how prompt and response become one text, as data.template

    @property
    def has_head(self) -> bool:
        """Does a model need a head of its own for these data, beside its backbone?"""
        return self.kind in ("label", "image")

    @property
    def label_column(self) -> str | None:
        """The column that holds what a head is to learn, if the data have one."""
        return self.columns[-1] if self.has_head else None

    def classes(self) -> dict[str, int]:
        """Class numbers by the strings that stand for them in the data: the name, or the number if no name is one."""
        by_name = {name: i for i, name in enumerate(self.labels)}
        if any(map(_is_whole, by_name)):
            return by_name
        return {str(i): i for i in range(len(by_name))} | by_name


PLAIN_TEXT = Schema("text", ("text",))  # of Python's standard library, the data that are embedded


def declared_schema(data: DataConfig, task: str) -> Schema:
    """The schema that the settings declare to a server that has no data; columns have their usual names."""
    if task == "seq2seq":
        return Schema("response", ("prompt", "response"))
    if not data.labels:
        if task in ("auto", "lm"):
            return PLAIN_TEXT
        raise ConfigError(f"model.task = {task}: the server has no data to find the classes in; set data.labels")
    if task == "image":
        return Schema("image", ("image", "label"), data.labels)
    return Schema("label", ("text", "label"), data.labels)


def schema_of(tables: Sequence[Table], data: DataConfig, task: str) -> Schema:
    """The meaning of the tables' columns, with the names of the classes, after a look at every row.

    Raises `DataError` and `ConfigError` for data that cannot be used, with their place.
    """
    return _labelled(replace(find_schema(data, task, tables[0]), template=data.template), data, tables)


def check_tables(tables: Sequence[Table], schema: Schema, classes: Container[str]) -> None:
    """Raise `DataError` for the first row that does not fit the schema, or has another class than these."""
    for table in tables:
        _check(table, schema)
        _check_labels(table, schema, classes)


def find_schema(data: DataConfig, task: str, table: Table) -> Schema:
    """What the columns mean by the settings, and else by their names, the likeliest first.

    Raises `DataError` for a column that is not there, or if nothing says what to learn, and `ConfigError` if all that
    could be learned is for another task.
    """
    columns = table.columns
    named = _named_columns(data)
    for key, name in named:
        if name not in columns:
            raise DataError(f'{table.name}: no column "{name}", as data.{key} has it; {nearest(name, columns)}')
    schemas = _by_likelihood(data, named, columns)
    for schema in schemas:
        if schema.kind in KINDS.get(task, (schema.kind,)):
            return schema
    there = f"{table.name} has the columns {', '.join(columns)}"
    if schemas:
        raise ConfigError(f"model.task = {task} does not go with the data: {there}; set {NEEDS[task]}, or another task")
    raise DataError(f"{there}, which do not say what to learn; set {NEEDS.get(task, ', or '.join(NEEDS.values()))}")


def _named_columns(data: DataConfig) -> list[tuple[str, str]]:
    """The columns that the settings name, each with the key that names it."""
    settings = [*(("text", name) for name in data.text), ("label", data.label), ("prompt", data.prompt)]
    settings += [("response", data.response), ("messages", data.messages), ("image", data.image)]
    return [(key, name) for key, name in settings if name]


def _by_likelihood(data: DataConfig, named: Sequence[tuple[str, str]], columns: Sequence[str]) -> list[Schema]:
    """The schemas that have all columns that the settings name, the likeliest first."""
    wanted = {name for key, name in named if key != "label"}
    schemas = [schema for schema in possible_schemas(data, columns) if wanted <= {*schema.columns}]
    if not data.label:
        return schemas
    # whoever names a label wants it learned, except by a language model, where it serves to tell the clients apart
    return sorted(schemas, key=lambda schema: data.label not in schema.columns)


def possible_schemas(data: DataConfig, columns: Sequence[str]) -> list[Schema]:
    """Every schema that these columns can have."""
    image = _found(data.image, IMAGE, columns)
    label = _found(data.label, LABEL, columns)
    texts = data.text or (_found("", TEXT, columns),)
    schemas = [
        Schema("chat", (_found(data.messages, CHAT, columns),)),
        Schema("response", _prompt_and_response(data, columns)),
        Schema("image", (image, label)),
        Schema("label", (*texts, label)),
        Schema("text", texts),
    ]
    return [schema for schema in schemas if all(schema.columns) and len(schema.columns) <= MOST_COLUMNS[schema.kind]]


def _found(chosen: str, usual: Iterable[str], columns: Sequence[str]) -> str:
    """The column that the settings choose, or else the first of the usual names that there is; empty for none."""
    return chosen or next((name for name in usual if name in columns), "")


def _prompt_and_response(data: DataConfig, columns: Sequence[str]) -> tuple[str, str]:
    """The columns of prompt and response: as chosen, or else a usual pair of which both are there."""
    if data.prompt or data.response:
        prompts, responses = zip(*PAIRS, strict=True)
        return _found(data.prompt, prompts, columns), _found(data.response, responses, columns)
    return next((pair for pair in PAIRS if {*pair} <= {*columns}), ("", ""))


def _labelled(schema: Schema, data: DataConfig, tables: Sequence[Table]) -> Schema:
    """The schema with the names of its classes, after a look at every row."""
    for table in tables:
        _check(table, schema)
    if schema.label_column is None:
        return schema
    names = data.labels or _dataset_classes(tables[0], schema) or _found_classes(tables, schema)
    if len(set(names)) < max(2, len(names)):
        raise DataError(f"{tables[0].name}: a classifier needs two different classes, and has {', '.join(names)}")
    schema = replace(schema, labels=names)
    for table in tables:
        _check_labels(table, schema, schema.classes())
    return schema


def _dataset_classes(table: Table, schema: Schema) -> tuple[str, ...]:
    """The classes that a dataset of the hub has written down; empty for plain rows."""
    feature = getattr(table.rows, "features", {}).get(schema.label_column)
    return tuple(getattr(feature, "names", ()))


def _found_classes(tables: Sequence[Table], schema: Schema) -> tuple[str, ...]:
    """The classes that occur in the data, in order: numbers by size, names by the alphabet."""
    found = sorted(labels_in(tables, schema))
    return tuple(sorted(found, key=int) if all(map(_is_whole, found)) else found)


def labels_in(tables: Sequence[Table], schema: Schema) -> set[str]:
    """The labels as they stand in the data."""
    columns = (column(table.rows, schema.columns[-1]) for table in tables)
    return set(map(str, chain.from_iterable(columns)))


def _is_whole(name: str) -> bool:
    return re.fullmatch("-?[0-9]+", name) is not None


def _check_labels(table: Table, schema: Schema, known: Container[str]) -> None:
    """Raise `DataError` for the first row whose class is not known; data without classes pass."""
    if schema.label_column is None:
        return
    for i, value in enumerate(column(table.rows, schema.label_column)):
        if str(value) not in known:
            raise DataError(
                f'{table.location(i)}: label "{value}" is no class of the training data or of data.labels; '
                f"{nearest(str(value), schema.labels)}"
            )


def _check(table: Table, schema: Schema) -> None:
    """Raise `DataError` for the first row that lacks a column, or has in it what the schema cannot take."""
    names, rows = _checked_columns(table, schema)
    for i, row in enumerate(rows):
        for name in names:
            if name not in row:
                raise DataError(f'{table.location(i)}: no column "{name}"; {nearest(name, row)}')
            wrong = _wrong(schema, name, row[name])
            if wrong:
                raise DataError(f'{table.location(i)}: "{name}" {wrong}')


def _checked_columns(table: Table, schema: Schema) -> tuple[tuple[str, ...], Iterable[Mapping[str, Any]]]:
    """The columns whose every value is checked, and the rows with these alone where that saves reading others."""
    rows: Any = table.rows
    if not hasattr(rows, "column_names"):
        return schema.columns, rows
    for name in schema.columns:
        if name not in rows.column_names:
            raise DataError(f'{table.name}: no column "{name}"; {nearest(name, rows.column_names)}')
    names = (
        schema.columns[1:] if schema.kind == "image" else schema.columns
    )  # to look at an image would be to decode it
    return names, rows.select_columns(list(names))


def _wrong(schema: Schema, name: str, value: Any) -> str:
    """The reason to refuse a value in column `name`, to follow that name in an error; empty for a good value."""
    if schema.kind == "chat":
        return _wrong_chat(value)
    if name == schema.label_column:
        return _wrong_label(value)
    if schema.kind == "image":
        return "is null; it takes the name of a file, or image data" if value is None else ""
    return "" if isinstance(value, str) else f"is {_type(value)}; it takes text"


def _wrong_label(value: Any) -> str:
    good = isinstance(value, int | str) and value != ""
    return "" if good else f"is {_type(value)}; a label is a whole number or a name"


def _type(value: Any) -> str:
    """The type of a value in the words of an error: "null", "empty", "an int", "a list"."""
    if value is None:
        return "null"
    if value == "":
        return "empty"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _wrong_chat(messages: Any) -> str:
    """The reason to refuse a conversation; empty for one that has an assistant's turn."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "is no list of messages"
    for n, message in enumerate(messages, 1):
        if lacking := _lacking(message):
            return f'has a message, number {n}, without "{lacking[0]}" or where it is not text'
    roles = [message["role"] for message in messages]
    return "" if "assistant" in roles else "has no assistant's turn to learn from"


def _lacking(message: Any) -> list[str]:
    """The parts of a message that it has not, or not as text."""
    fields = message if isinstance(message, Mapping) else {}
    return [key for key in ("role", "content") if not isinstance(fields.get(key), str)]
