"""Whose examples are whose: read from files, a folder, the hub or Python's own library, and shared among clients."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from fedlora.errors import ConfigError, DataError
from fedlora.sections import DataConfig
from fedlora.seeds import derive

from . import python_stdlib
from .classes import check_labels, class_names, labels_in, with_names
from .file_names import odd_names
from .limits import limited, limited_rows, read_limit
from .partition import hold_out, sample_out, split
from .row_checks import check_rows, without_text
from .rows import Rows as Rows
from .rows import pool, take
from .schema import PLAIN_TEXT, Schema, declared_schema, find_schema
from .sources import Table, read_tables
from .targets import as_lists, gather, gathered, with_target

CLIENTS = 50  # where nothing says how many


@dataclass(frozen=True, eq=False)
class Federated:
    """The rows that one side of a run has: a simulation all of them, a server no client's, a client its own alone."""

    schema: Schema
    clients: tuple[Rows, ...]  # training rows of each client
    heldout: tuple[Rows, ...]  # each client's own held-out rows; empty where data.holdout = 0
    evaluation: Rows  # the global held-out rows
    dealt: bool = False  # do the clients' rows come out of one pool, and not each from a source of its own?
    warnings: tuple[str, ...] = ()  # of what the readers of its files found odd, a sentence each


def load(data: DataConfig, task: str, *, clients: int, seed: int) -> Federated:
    """Read the data and share them among the clients; `clients` = 0 takes one a file or natural id, else 50.

    Of data.path a sample by the seed is used where data.limit says so; of data.eval the same one with every seed.

    Raises `ConfigError` where settings contradict the data, `DataError` for data that cannot be used, with its place.
    """
    if data.path:
        tables, schema = _read_with_schema(data.path, data, task)
        tables = limited(tables, data, _limit_key(seed))
        dealt = not (_is_by_file(data, tables) or data.partition.startswith("natural"))
        shares, evaluation = _share(data, schema, tables, clients=clients, seed=seed)
        odd = tuple(odd_names([table.name for table in tables])) if _is_by_file(data, tables) else ()
    else:
        tables, schema, dealt, odd = [], PLAIN_TEXT, True, ()
        shares, evaluation = _library(data, task, clients)
        shares = limited_rows(shares, data, _limit_key(seed))
    if data.eval:
        known = schema.classes() if data.labels else {*schema.labels, *labels_in(tables, schema)}
        evaluation = _read_as(schema, data.eval, data, known)
    kept, held = _hold_out(shares, data, "holdout", schema, seed=seed)
    return Federated(schema, tuple(kept), tuple(held), evaluation, dealt, (*_warnings(tables), *odd))


def server_data(data: DataConfig, task: str, embedded: bool) -> Federated:
    """The rows that the server of a deployed run has: those for the global evaluation, and no client's.

    Raises `ConfigError` where nothing says which classes there are.
    """
    if data.eval:
        tables, schema = _read_with_schema(data.eval, data, task)
        evaluation = _pooled(limited(tables, data, _limit_key(0)))
    elif embedded:
        schema, evaluation = PLAIN_TEXT, _library(data, task, 1)[1]
    else:
        schema, evaluation = declared_schema(data, task), ()
    return Federated(schema, clients=(), heldout=(), evaluation=evaluation)


def client_data(
    data: DataConfig, task: str, *, id: int, clients: int, seed: int, key: bytes | None = None
) -> Federated:
    """The rows that one client of a deployed run has: its own, some of them held out for its own evaluation.

    Which are held out depends on the client's secret key; without one, on the seed. Without data of its own, a client
    has its share of the embedded data, as in a simulation of so many clients.
    """
    if data.path:
        tables, schema = _read_with_schema(data.path, data, task)
        rows = _pooled(limited(tables, data, key or _limit_key(seed)))
    else:
        schema, rows = PLAIN_TEXT, _library(data, task, clients)[0][id]
    if schema.labels and not data.labels:
        raise ConfigError("this client does not say which classes there are, and in what order; give it --data.labels")
    kept, held = _hold_out([rows], data, "holdout", schema, seed=seed, first=id, key=key)
    return Federated(schema, tuple(kept), tuple(held), evaluation=())


def _limit_key(seed: int) -> bytes:
    """The key by which data.limit samples, where no client has one of its own."""
    return derive(seed, "limit").to_bytes(8)


def readable(path: str) -> None:
    """Raise `DataError` if the data at `path` cannot be read, before anybody waits for them; an empty path is none."""
    if path:
        read_tables(path, 0)


def public_rows(path: str, schema: Schema) -> Rows:
    """The rows at `path`, which are nobody's secret, in the run's schema; none for an empty path.

    Raises `DataError` with the place of what does not fit.
    """
    return _read_as(schema, path, DataConfig(), set(schema.labels)) if path else ()


def _read_with_schema(path: str, data: DataConfig, task: str) -> tuple[list[Table], Schema]:
    """The tables at `path`, and the schema that the settings and the columns give them."""
    tables, data = gather(read_tables(path, read_limit(data)), data, task)
    schema = replace(find_schema(data, task, tables), template=data.template)
    schema = with_target(schema, tables, data, task)
    tables = _checked(tables, schema)
    if schema.label_column is None or schema.target == "number":
        return tables, schema
    if schema.target == "labels":
        tables, names = as_lists(tables, schema, data.labels)
        schema = replace(schema, labels=names)
    schema = class_names(tables, schema, data.labels)
    return _labelled(tables, schema, schema.classes()), schema


def _checked(tables: Sequence[Table], schema: Schema) -> list[Table]:
    """The tables, whose every row fits the schema, with a warning of each in which there is nothing to learn.

    Raises `DataError` for the first row that does not fit, and if there is nothing to learn in any table.
    """
    for table in tables:
        check_rows(table, schema)
    empty = [without_text(table, schema) for table in tables]
    if all(empty):
        raise DataError(f"{empty[0]}; fill that column, or name another")
    return [
        replace(table, warnings=(*table.warnings, warning) if warning else table.warnings)
        for table, warning in zip(tables, empty, strict=True)
    ]


def _warnings(tables: Sequence[Table]) -> tuple[str, ...]:
    return tuple(chain.from_iterable(table.warnings for table in tables))


def _labelled(tables: Sequence[Table], schema: Schema, classes: Container[str]) -> list[Table]:
    """The tables with their labels as the schema has them; raises `DataError` for a class that is none of these."""
    for table in tables:
        check_labels(table, schema, classes)
    return with_names(tables, schema)


def _read_as(schema: Schema, path: str, data: DataConfig, classes: Container[str]) -> Rows:
    """The rows at `path` within data.limit, which must have this schema and no class but these."""
    tables = read_tables(path, read_limit(data))
    if schema.target == "labels":
        tables = [gathered(table, schema.labels) for table in tables]
    tables = _checked(tables, schema)
    if schema.target == "labels":
        tables, _ = as_lists(tables, schema, schema.labels)
    return _pooled(limited(_labelled(tables, schema, classes), data, _limit_key(0)))


def _pooled(tables: Sequence[Table]) -> Rows:
    return pool([table.rows for table in tables])


def _library(data: DataConfig, task: str, clients: int) -> tuple[list[Rows], Rows]:
    """Each client's rows and the evaluation's from the embedded data: Python's standard library, by packages."""
    if task not in ("auto", "lm"):
        raise ConfigError(f"model.task = {task} needs data of your own; set data.path")
    if data.partition != "auto":
        raise ConfigError(f'data.partition = "{data.partition}" needs data of your own; set data.path')
    try:
        shares = python_stdlib.clients(clients or CLIENTS)
    except ValueError as e:
        raise ConfigError(f"clients = {clients}: {str(e).rstrip('.')}; ask for fewer, or set data.path") from e
    return [_document_rows(share) for share in shares], _document_rows(python_stdlib.heldout())


def _document_rows(documents: Iterable[python_stdlib.Document]) -> Rows:
    return [{"text": d.text, "package": d.package, "path": d.path} for d in documents]


def _share(
    data: DataConfig, schema: Schema, tables: list[Table], *, clients: int, seed: int
) -> tuple[list[Rows], Rows]:
    """Each client's rows, and the rows drawn for the global evaluation; none of these if data.eval has others."""
    data = replace(data, eval_share=0.0) if data.eval else data
    if _is_by_file(data, tables):
        if clients not in (0, len(tables)):
            raise ConfigError(
                f"clients = {clients}, but {data.path} is one client a file and has {len(tables)}; "
                "leave clients at 0, or set data.partition = iid"
            )
        shares, drawn = _hold_out([table.rows for table in tables], data, "eval_share", schema, seed=seed)
        return shares, pool(drawn)
    [rows], [evaluation] = _hold_out([_pooled(tables)], data, "eval_share", schema, seed=seed)
    return _partitioned(rows, data, schema, clients=clients, seed=seed), evaluation


def _hold_out(
    parts: Sequence[Rows],
    data: DataConfig,
    share: Literal["holdout", "eval_share"],
    schema: Schema,
    *,
    seed: int,
    first: int = 0,
    key: bytes | None = None,
) -> tuple[list[Rows], list[Rows]]:
    """The rows that every part keeps, and those held out of it: the share that a setting names, as data.split says."""
    value, purpose = getattr(data, share), f"data.{share}"
    if data.split == "sample":
        return sample_out(parts, value, purpose, seed=seed, first=first)
    key = key or derive(seed, "split").to_bytes(8)
    return hold_out(parts, value, purpose, columns=schema.columns, key=key)


def _is_by_file(data: DataConfig, tables: Sequence[Table]) -> bool:
    """Is each file a client's?"""
    return data.partition == "files" or (data.partition == "auto" and len(tables) > 1)


def _partitioned(rows: Rows, data: DataConfig, schema: Schema, *, clients: int, seed: int) -> list[Rows]:
    """Each client's rows by data.partition."""
    unsaid = 0 if data.partition.startswith("natural") else CLIENTS
    label = data.label or schema.label_column
    if schema.target != "class" and label == schema.label_column and data.partition.startswith(("dirichlet", "labels")):
        what = "numbers" if schema.target == "number" else "several labels"
        raise ConfigError(
            f'data.partition = "{data.partition}" deals rows by their class, and "{label}" holds {what}; '
            "choose iid, size or natural:COLUMN"
        )
    shares = split(rows, data.partition, clients=clients or unsaid, label=label, seed=seed)
    return [take(rows, share) for share in shares]
