"""Whose examples are whose: read from files, a folder, the hub or Python's own library, and shared among clients."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError
from fedlora.sections import DataConfig

from .partition import hold_out, split
from .rows import Rows as Rows
from .rows import pool, take
from .schema import Form, _check, _check_labels, _form, _labelled, _values
from .sources import Table
from .sources import tables as read

CLIENTS = 50  # where nothing says how many


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
    from . import python_stdlib

    if task not in ("auto", "lm"):
        raise ConfigError(f"model.task = {task} needs examples with a label; set data.path")
    if data.partition != "auto":
        raise ConfigError(f'data.partition = "{data.partition}" needs data of your own; set data.path')

    def rows(documents: Iterable[python_stdlib.Document]) -> Rows:
        return [{"text": d.text, "package": d.package, "path": d.path} for d in documents]

    try:
        shares = python_stdlib.clients(clients or CLIENTS)
    except ValueError as e:
        raise ConfigError(f"clients = {clients}: {str(e).rstrip('.')}; ask for fewer, or set data.path") from e
    return [rows(share) for share in shares], rows(python_stdlib.heldout())


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
