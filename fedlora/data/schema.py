"""Which columns of a table hold texts, labels, images or conversations, and whether their values can be used."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
KINDS = {"lm": ("chat", "response", "text"), "classify": ("label",), "image": ("image",)}  # by model.task
NEEDS = {"lm": "data.text, data.messages, or data.prompt and data.response", "classify": "data.text and data.label"}
NEEDS |= {"image": "data.image and data.label"}


@dataclass(frozen=True)
class Form:
    """What the columns of the data mean."""

    kind: Literal["text", "response", "chat", "label", "image"]
    columns: tuple[str, ...]  # (text,), (prompt, response), (messages,), (text[, text2], label) or (image, label)
    labels: tuple[str, ...] = ()  # class names in order, of "label" and "image"

    def classes(self) -> dict[str, int]:
        """Class numbers by what may stand in the data as a string: the name, or the number where no name is one."""
        names = {name: i for i, name in enumerate(self.labels)}
        return names if any(map(_is_whole, names)) else {str(i): i for i in range(len(names))} | names


def _form(data: DataConfig, task: str, table: Table) -> Form:
    """What the columns mean: as the settings say, and else by their names, the likeliest first."""
    columns = table.columns
    named = [("text", name) for name in data.text]
    named += [(key, getattr(data, key)) for key in ("label", "prompt", "response", "messages", "image")]
    for key, name in named:
        if name and name not in columns:
            raise DataError(f'{table.name}: no column "{name}", as data.{key} has it; {nearest(name, columns)}')
    wanted = {name for key, name in named if name and key != "label"}
    forms = [form for form in _readings(data, columns) if wanted <= {*form.columns}]
    # who names a label wants it learned, except by a language model, where it serves to tell the clients apart
    forms.sort(key=lambda form: bool(data.label) and data.label not in form.columns)
    fitting = [form for form in forms if form.kind in KINDS.get(task, (form.kind,))]
    if fitting:
        return fitting[0]
    there = f"{table.name} has the columns {', '.join(columns)}"
    if forms:
        raise ConfigError(f"model.task = {task} does not go with the data: {there}; set {NEEDS[task]}, or another task")
    raise DataError(f"{there}, which do not say what to learn; set {NEEDS.get(task) or ', or '.join(NEEDS.values())}")


def _readings(data: DataConfig, columns: Sequence[str]) -> Iterator[Form]:
    """Every form that these columns can have."""

    def find(chosen: str, common: Iterable[str]) -> str:
        return chosen or next((name for name in common if name in columns), "")

    label, image, chat = find(data.label, LABEL), find(data.image, IMAGE), find(data.messages, CHAT)
    text = data.text or tuple(name for name in TEXT if name in columns)[:1]
    pair = next((pair for pair in PAIRS if {*pair} <= {*columns}), ("", ""))
    if data.prompt or data.response:
        pair = find(data.prompt, (p for p, _ in PAIRS)), find(data.response, (r for _, r in PAIRS))
    if chat:
        yield Form("chat", (chat,))
    if all(pair):
        yield Form("response", pair)
    if image and label:
        yield Form("image", (image, label))
    if label and len(text) in (1, 2):
        yield Form("label", (*text, label))
    if len(text) == 1:
        yield Form("text", text)


def _labelled(form: Form, data: DataConfig, tables: Sequence[Table]) -> Form:
    """The form with the names of its classes, after a look at every row."""
    for table in tables:
        _check(table, form)
    if form.kind not in ("label", "image"):
        return form
    feature = getattr(tables[0].rows, "features", {}).get(form.columns[-1])
    names = data.labels or tuple(getattr(feature, "names", ()))
    if not names:
        found = sorted(_values(tables, form))
        names = tuple(sorted(found, key=int) if all(map(_is_whole, found)) else found)
    if len(set(names)) < max(2, len(names)):
        raise DataError(f"{tables[0].name}: a classifier needs two different classes, and has {', '.join(names)}")
    form = replace(form, labels=names)
    for table in tables:
        _check_labels(table, form, form.classes())
    return form


def _values(tables: Sequence[Table], form: Form) -> set[str]:
    """The labels as they stand in the data."""
    return {str(value) for table in tables for value in column(table.rows, form.columns[-1])}


def _is_whole(name: str) -> bool:
    return re.fullmatch("-?[0-9]+", name) is not None


def _check_labels(table: Table, form: Form, known: Container[str]) -> None:
    for i, value in enumerate(column(table.rows, form.columns[-1]) if form.labels else ()):
        if str(value) not in known:
            raise DataError(
                f'{table.place(i)}: label "{value}" is no class of the training data or of data.labels; '
                f"{nearest(str(value), form.labels)}"
            )


def _check(table: Table, form: Form) -> None:
    """Refuse a row that lacks a column, or has in it what the form cannot take."""
    rows: Any = table.rows
    names = form.columns
    if hasattr(rows, "column_names"):
        for name in names:
            if name not in rows.column_names:
                raise DataError(f'{table.name}: no column "{name}"; {nearest(name, rows.column_names)}')
        names = names[1:] if form.kind == "image" else names  # to look at an image would be to decode it
        rows = rows.select_columns(list(names))
    for i, row in enumerate(rows):
        for name in names:
            if name not in row:
                raise DataError(f'{table.place(i)}: no column "{name}"; {nearest(name, row)}')
            wrong = _wrong(form, name, row[name])
            if wrong:
                raise DataError(f'{table.place(i)}: "{name}" {wrong}')


def _wrong(form: Form, name: str, value: Any) -> str:
    """What a value is that it may not be; empty where it is good."""
    if form.kind == "chat":
        return _wrong_chat(value)
    if form.kind in ("label", "image") and name == form.columns[-1]:
        good = isinstance(value, int | str) and value != ""
        return "" if good else f"is {_type(value)}; a label is a whole number or a name"
    if form.kind == "image":
        return "is null; it takes the name of a file, or image data" if value is None else ""
    return "" if isinstance(value, str) else f"is {_type(value)}; it takes text"


def _type(value: Any) -> str:
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return "null" if value is None else "empty" if value == "" else f"{article} {name}"


def _wrong_chat(messages: Any) -> str:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "is no list of messages"
    for n, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                return f'has a message, number {n}, without "{key}" or where it is not text'
    return "" if any(m["role"] == "assistant" for m in messages) else "has no assistant's turn to learn from"
