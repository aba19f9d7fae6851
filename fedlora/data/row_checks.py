"""Whether the rows of a table fit a schema; the first that does not is named with its place."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedlora.errors import DataError, nearest

from .conversations import prompt_texts, wrong_messages
from .images import why_unreadable
from .rows import column
from .schema import Schema
from .tables import Table
from .targets import type_in_words, wrong_class, wrong_target


def check_rows(table: Table, schema: Schema) -> None:
    """Raise `DataError` for the first row that lacks a column, or has in it what the schema cannot take."""
    names, rows = _checked_columns(table, schema)
    for i, row in enumerate(rows):
        for name in names:
            if reason := _wrong(schema, name, row):
                raise DataError(f"{table.location(i)}: {reason}")


def without_text(table: Table, schema: Schema) -> str:
    """A sentence about a table in which there is nothing to learn, as all of its texts are empty; empty for others."""
    learned = schema.columns[-1]
    if schema.kind not in ("text", "response") or any(map(str.strip, column(table.rows, learned))):
        return ""
    return f'{table.name}: "{learned}" is empty in all {len(table.rows)} rows: there is nothing to learn'


def _checked_columns(table: Table, schema: Schema) -> tuple[tuple[str, ...], Iterable[Mapping[str, Any]]]:
    """The columns whose every value is checked, and the rows with these alone where that saves reading others."""
    rows: Any = table.rows
    if not hasattr(rows, "column_names"):
        return schema.columns, rows
    for name in schema.columns:
        if name not in rows.column_names and name not in schema.optional:
            raise DataError(f'{table.name}: no column "{name}"; {nearest(name, rows.column_names)}')
    return schema.columns, rows.select_columns([name for name in schema.columns if name in rows.column_names])


def _wrong(schema: Schema, name: str, row: Mapping[str, Any]) -> str:
    """The reason to refuse what a row has in column `name`; empty for a good value."""
    if name not in row and name not in schema.optional:
        return f'no column "{name}"; {nearest(name, row)}'
    reason = _wrong_value(schema, name, row.get(name))
    if not reason and schema.kind == "response" and name == schema.columns[-1] and not prompt_texts(schema, row):
        return f'"{schema.asking[0]}" is empty, and so is "{schema.asking[-1]}": nothing asks for the answer'
    return f'"{name}" {reason}' if reason else ""


def _wrong_value(schema: Schema, name: str, value: Any) -> str:
    """The reason to refuse a value in column `name`, to follow that name in an error; empty for a good value."""
    if schema.kind in ("chat", "preference") and name in schema.spoken:
        return _wrong_turns(schema, name, value)
    if name == schema.label_column:
        return wrong_class(value) if schema.target == "class" else wrong_target(schema, value)
    if schema.kind == "image":
        return "is null; it takes the name of a file, or image data" if value is None else why_unreadable(value)
    good = isinstance(value, str) or (value is None and name in schema.optional)
    return "" if good else f"is {type_in_words(value)}; it takes text"


def _wrong_turns(schema: Schema, name: str, value: Any) -> str:
    """The reason to refuse messages. Where the prompt has a column of its own, prompt and answer may also be texts."""
    if len(schema.spoken) > 1 and (isinstance(value, str) or value is None):
        return "" if value is not None else "is null; it takes text or a list of messages"
    return wrong_messages(value, answers=name not in schema.asking)
