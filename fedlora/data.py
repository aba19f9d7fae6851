"""Whose examples are whose: read from files, a folder, the hub or Python's own library, and shared among clients."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .config import DataConfig
from .errors import ConfigError, DataError, nearest
from .partition import Rows as Rows
from .partition import column, hold_out, pool, split, take
from .read import Table
from .read import tables as read

CLIENTS = 50  # where nothing says how many
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


@dataclass(frozen=True, eq=False)
class Federated:
    """The rows that one side of a run has: a simulation all of them, a server no client's, a client its own alone."""

    form: Form
    clients: tuple[Rows, ...]  # training rows of each client
    heldout: tuple[Rows, ...]  # each client's own held-out rows; empty where data.holdout = 0
    evaluation: Rows  # the global held-out rows


def load(data: DataConfig, task: str, clients: int, seed: int) -> Federated:
    """Read the data and share it out; `clients` = 0 takes one a file or natural id, else 50.

    Raises `ConfigError` where settings contradict the data, `DataError` for data that cannot be used, with its place.
    """
    tables = read(data.path, data.limit) if data.path else []
    form = _labelled(_form(data, task, tables[0]), data, tables) if tables else Form("text", ("text",))
    shares, evaluation = _share(data, form, tables, clients, seed) if tables else _library(data, task, clients)
    if data.eval:
        others = read(data.eval, data.limit)
        known = form.classes() if data.labels else _values(tables, form)
        for table in others:
            _check(table, form)
            _check_labels(table, form, known)
        evaluation = pool([table.rows for table in others])
    kept, held = hold_out(shares, data.holdout, seed, "data.holdout")
    return Federated(form, tuple(kept), tuple(held), evaluation)


def server(data: DataConfig, task: str, embedded: bool) -> Federated:
    """The rows that the server of a deployed run has: those for the global evaluation, and no client's.

    Raises `ConfigError` where nothing says which classes there are.
    """
    if data.eval:
        tables = read(data.eval, data.limit)
        form = _labelled(_form(data, task, tables[0]), data, tables)
        return Federated(form, (), (), pool([table.rows for table in tables]))
    if embedded:
        return Federated(Form("text", ("text",)), (), (), _library(data, task, 1)[1])
    if task in ("auto", "lm") and not data.labels:
        return Federated(Form("text", ("text",)), (), (), ())
    if not data.labels:
        raise ConfigError(f"model.task = {task}: the server has no data to find the classes in; set data.labels")
    kind: Literal["image", "label"] = "image" if task == "image" else "label"
    return Federated(Form(kind, (("image" if kind == "image" else "text"), "label"), data.labels), (), (), ())


def client(data: DataConfig, task: str, id: int, clients: int, seed: int) -> Federated:
    """The rows that one client of a deployed run has: its own, some of them held out for its own evaluation.

    Without data of its own, a client has its share of the embedded data, as in a simulation of so many clients.
    """
    if data.path:
        tables = read(data.path, data.limit)
        form, rows = _labelled(_form(data, task, tables[0]), data, tables), pool([table.rows for table in tables])
    else:
        form, rows = Form("text", ("text",)), _library(data, task, clients)[0][id]
    if form.labels and not data.labels:
        raise ConfigError("the server does not say which classes there are, and in what order; have it set data.labels")
    kept, held = hold_out([rows], data.holdout, seed, "data.holdout", id)
    return Federated(form, tuple(kept), tuple(held), ())


def readable(path: str) -> None:
    """Raise `DataError` for a file that cannot be read, before anybody waits for what is in it; no path: nothing."""
    if path:
        read(path, 0)


def public(path: str, form: Form) -> Rows:
    """Rows of the run's form that are nobody's secret; none without a path. Raises `DataError` with the place."""
    tables = read(path, 0) if path else []
    for table in tables:
        _check(table, form)
        _check_labels(table, form, set(form.labels))
    return pool([table.rows for table in tables]) if tables else ()


def _library(data: DataConfig, task: str, clients: int) -> tuple[list[Rows], Rows]:
    """The embedded default: Python's standard library, packages apart."""
    from . import stdlib

    if task not in ("auto", "lm"):
        raise ConfigError(f"model.task = {task} needs examples with a label; set data.path")
    if data.partition != "auto":
        raise ConfigError(f'data.partition = "{data.partition}" needs data of your own; set data.path')

    def rows(documents: Iterable[stdlib.Document]) -> Rows:
        return [{"text": d.text, "package": d.package, "path": d.path} for d in documents]

    try:
        shares = stdlib.clients(clients or CLIENTS)
    except ValueError as e:
        raise ConfigError(f"clients = {clients}: {str(e).rstrip('.')}; ask for fewer, or set data.path") from e
    return [rows(share) for share in shares], rows(stdlib.heldout())


def _share(data: DataConfig, form: Form, tables: list[Table], clients: int, seed: int) -> tuple[list[Rows], Rows]:
    """Each client's rows, and those drawn for the evaluation where no other data serve for it."""
    by_file = data.partition == "files" or (data.partition == "auto" and len(tables) > 1)
    if by_file and clients not in (0, len(tables)):
        raise ConfigError(
            f"clients = {clients}, but {data.path} is one client a file and has {len(tables)}; "
            "leave clients at 0, or set data.partition = iid"
        )
    pools = [table.rows for table in tables] if by_file else [pool([table.rows for table in tables])]
    pools, drawn = hold_out(pools, 0.0 if data.eval else data.eval_share, seed, "data.eval_share")
    evaluation = pool(drawn)
    if by_file:
        return pools, evaluation
    n = clients or (0 if data.partition.startswith("natural") else CLIENTS)
    label = data.label or (form.columns[-1] if form.labels else None)
    return [take(pools[0], share) for share in split(pools[0], data.partition, n, label, seed)], evaluation


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
