"""Whose examples are whose: read from files, a folder, the hub or Python's own library, and shared among clients."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from glob import glob, has_magic
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from .config import DataConfig
from .errors import ConfigError, DataError, nearest
from .partition import Rows, hold, split

CLIENTS = 50  # where nothing says how many
TEXT = ("text", "sentence", "sentence1", "content", "review", "utterance")
LABEL = ("label", "category", "labels", "intent", "target", "class")
ANSWERS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
TASKS = {"auto": "chat response image label text", "lm": "chat response text", "classify": "label", "image": "image"}
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Form:
    """What the columns of the data mean."""

    kind: Literal["text", "response", "chat", "label", "image"]
    columns: tuple[str, ...]  # (text,), (prompt, response), (messages,), (text[, text2], label) or (image, label)
    labels: tuple[str, ...] = ()  # class names in order, of "label" and "image"


@dataclass(frozen=True, eq=False)
class Federated:
    """The examples of every client, and those that no client has."""

    form: Form
    clients: tuple[Rows, ...]  # training rows of each client
    heldout: tuple[Rows, ...]  # each client's own held-out rows; empty where data.holdout = 0
    evaluation: Rows  # the global held-out rows


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one file, and where they stand in it."""

    name: str
    rows: Rows
    lines: Sequence[int] = ()

    def place(self, row: int) -> str:
        """Where a row is, in the words of an error."""
        return f"{self.name} line {self.lines[row]}" if self.lines else f"{self.name} row {row + 1}"

    def head(self, limit: int) -> "Table":
        """The first rows; 0: all."""
        return replace(self, rows=take(self.rows, range(min(limit, len(self.rows))))) if limit else self

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in their order."""
        return list(getattr(self.rows, "column_names", None) or dict.fromkeys(k for row in self.rows for k in row))


def load(data: DataConfig, task: str, clients: int, seed: int) -> Federated:
    """Read the data and share it out; `clients` = 0 takes one a file or natural id, else 50.

    Raises `ConfigError` where settings contradict the data, `DataError` for data that cannot be used, with its place.
    """
    if not data.path:
        form, shares, evaluation = _library(data, task, clients)
    else:
        tables = [table.head(data.limit) for table in _tables(data.path)]
        form = _labelled(_form(data, task, tables[0]), data, tables)
        for table in tables:
            _check(table, form)
        shares, evaluation = _share(data, form, tables, clients, seed)
    if data.eval:
        others = [table.head(data.limit) for table in _tables(data.eval)]
        for table in others:
            _check(table, form)
        evaluation = _pool([table.rows for table in others])
    kept = [_hold(rows, data, f"{seed}/holdout/{i}", i) for i, rows in enumerate(shares)]
    return Federated(form, tuple(k for k, _ in kept), tuple(h for _, h in kept), evaluation)


def take(rows: Rows, which: Sequence[int]) -> Rows:
    """Some of the rows, in the order asked for."""
    dataset: Any = rows
    return dataset.select(which) if hasattr(rows, "select") else [rows[i] for i in which]  # type: ignore[no-any-return]


def _library(data: DataConfig, task: str, clients: int) -> tuple[Form, list[Rows], Rows]:
    """The embedded default: Python's standard library, packages apart."""
    from . import stdlib

    if task not in ("auto", "lm"):
        raise ConfigError(f"model.task = {task} needs examples with a label; set data.path")
    if data.partition != "auto":
        raise ConfigError(f'data.partition = "{data.partition}" needs data of its own; set data.path, or leave it at auto')

    def rows(documents: Iterable[stdlib.Document]) -> Rows:
        return [{"text": d.text, "package": d.package, "path": d.path} for d in documents]

    try:
        shares = stdlib.clients(clients or CLIENTS)
    except ValueError as e:
        raise ConfigError(f"clients = {clients}: {str(e).rstrip('.')}; ask for fewer, or set data.path") from e
    return Form("text", ("text",)), [rows(share) for share in shares], rows(stdlib.heldout())


def _share(data: DataConfig, form: Form, tables: list[Table], clients: int, seed: int) -> tuple[list[Rows], Rows]:
    """Each client's rows, and those kept for the evaluation where no other data serve for it."""
    by_file = data.partition == "files" or (data.partition == "auto" and len(tables) > 1)
    if by_file and clients not in (0, len(tables)):
        raise ConfigError(
            f"clients = {clients}, but {data.path} is {len(tables)} files, one a client; "
            "leave clients at 0, or set data.partition = iid"
        )
    pools = [table.rows for table in tables] if by_file else [_pool([table.rows for table in tables])]
    drawn = [
        hold(len(rows), 0 if data.eval else data.eval_share, f"{seed}/eval/{i}") for i, rows in enumerate(pools)
    ]
    evaluation = _pool([take(rows, out) for rows, (_, out) in zip(pools, drawn, strict=True)])
    pools = [take(rows, kept) for rows, (kept, _) in zip(pools, drawn, strict=True)]
    if by_file:
        bare = next((table.name for table, rows in zip(tables, pools, strict=True) if not len(rows)), None)
        if bare:
            raise DataError(f"{bare} has no example left to train on; set data.eval, or data.eval_share = 0")
        return pools, evaluation
    n = clients or (0 if data.partition.startswith("natural") else CLIENTS)
    label = data.label or (form.columns[-1] if form.kind in ("label", "image") else None)
    return [take(pools[0], share) for share in split(pools[0], data.partition, n, label, seed)], evaluation


def _hold(rows: Rows, data: DataConfig, seed: str, client: int) -> tuple[Rows, Rows]:
    if data.holdout and len(rows) < 2:
        raise DataError(
            f"client {client} has one example, and data.holdout = {data.holdout:g} takes it; "
            "ask for fewer clients, or set data.holdout = 0"
        )
    kept, out = hold(len(rows), data.holdout, seed)
    return take(rows, kept or out[:1]), take(rows, out if kept else out[1:])


def _pool(parts: Sequence[Rows]) -> Rows:
    if len(parts) > 1 and all(hasattr(rows, "select") for rows in parts):
        joined: Rows = import_module("datasets").concatenate_datasets(list(parts))
        return joined
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
