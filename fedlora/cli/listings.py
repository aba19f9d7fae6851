"""`fedlora strategies` and `fedlora settings`: what there is to choose from, as tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import inf
from typing import TYPE_CHECKING, Annotated, Any, get_origin

import typer

from fedlora.config import Setting, section_meanings, setting_key
from fedlora.config import settings as every_setting
from fedlora.errors import ConfigError, nearest

from .completion import choices, sections, strategy_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedlora.strategy import CatalogueEntry

Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
TYPES = {bool: "true, false", int: "integer", float: "number", str: "text"}

ROOM = 200  # characters that all columns of the table of strategies take
WIDE = ("kinds", "up", "down", "paper")  # columns that are left out where there are fewer
LEGEND = """
exact: the new model is the weighted mean of the clients' models. ranks: may those of clients differ. sums: the server
needs no single update, so its memory does not grow with the clients. Sides: A, B, R (a core), H (the head). up, down:
numbers a client sends and is sent a round and adapted module, of rank r and shape d_out x d_in, with K clients of ranks
R in all and r_max at most, q the rank of the newest offset, t the round from 0; the head comes on top; what a client
holds is not sent.
Round any of them: aggregate.optimizer, aggregate.robust (fedlora settings); Flower's own: flwr:FedAdam and others."""


def strategies(
    name: Annotated[
        str | None, typer.Argument(help="One of them, with all that it declares.", autocompletion=strategy_names)
    ] = None,
    as_json: Json = False,
) -> None:
    """The catalogue: every strategy with its declared properties and its paper."""
    from fedlora.strategy import catalogue, find

    chosen = find(name) if name else None
    rows = [_row(entry) for entry in catalogue() if chosen in (None, entry.cls)]
    if as_json:
        print(json.dumps(rows))
    elif name:
        print("\n".join(f"{heading + ':':10}{_cell(heading, value)}" for row in rows for heading, value in row.items()))
    else:
        _print_catalogue(rows)


def _print_catalogue(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of strategies, without its widest columns where there is no room for them."""
    console = _console(260)
    shown = [heading for heading in rows[0] if console.width >= ROOM or heading not in WIDE]
    table = _table(shown, ([_cell(heading, row[heading]) for heading in shown] for row in rows))
    table.columns[0].no_wrap = True
    console.print(table)
    if console.width < ROOM:
        print("\nWhat each sends and is sent, its kinds and its paper: fedlora strategies NAME, or a wider window.")
    print(LEGEND)


def _row(entry: "CatalogueEntry") -> dict[str, Any]:
    """What a strategy declares, by the heading of its column."""
    made, (trains, sends) = entry.default, entry.sides
    return {
        "name": entry.name,
        "strategy": entry.title,
        "exact": made.exact is True,
        "ranks": "mixed" if made.mixed_ranks else "alike",
        "sums": made.sums_only is True,
        "trains": trains,
        "sends": sends,
        "kinds": list(made.kinds),
        "up": made.up,
        "down": made.down,
        "options": entry.options,
        "paper": entry.paper,
    }


def _cell(column: str, value: Any) -> str:
    """What a strategy declares, as it stands in the table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(value)
    return value or {"options": "none"}.get(column, "?")


def settings(
    section: Annotated[
        str | None, typer.Argument(help="A section, as train, or a key; none: all.", autocompletion=sections)
    ] = None,
    as_json: Json = False,
) -> None:
    """Every setting there is, by sections, with its default and meaning."""
    found = _chosen(section)
    if as_json:
        print(json.dumps([_setting(setting) for setting in found]))
        return
    console, meanings = _console(100), section_meanings()
    for name, members in groupby(found, key=lambda setting: setting.section):
        console.print(f"{name}: {meanings[name]}", style="bold", markup=False)
        table = _table(["key", "default", "values", "meaning"], map(_setting_cells, members))
        for column, width in zip(table.columns, (24, 10, 10), strict=False):
            column.min_width = column.max_width = width
        console.print(table, "")


def _chosen(section: str | None) -> list[Setting]:
    """The settings of a section, or the one of this key. Raises `ConfigError` where there is none."""
    every = list(every_setting())
    if section is None:
        return every
    found = [setting for setting in every if section in (setting.section, setting.key)]
    found = found or [setting for setting in every if setting.key == setting_key(section)]
    if not found:
        raise ConfigError(f'there is no section "{section}"; {nearest(section, sections())}')
    return found


def _setting(setting: Setting) -> dict[str, Any]:
    """A setting as an object of JSON, which has no number for infinity."""
    default = "inf" if setting.default == inf else setting.default
    return {"key": setting.key, "default": default, "values": _values(setting), "meaning": setting.help}


def _setting_cells(setting: Setting) -> list[str]:
    default = ",".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)
    values = _values(setting)
    return [setting.key, default, ", ".join(values) if isinstance(values, list) else values, setting.help]


def _values(setting: Setting) -> str | list[str]:
    """The values that a setting takes, where they are few, or else their type."""
    if get_origin(setting.kind) is tuple:
        return "names"
    if get_origin(setting.kind) is dict:
        return "key=value"
    return [*choices(setting.kind)] or TYPES[setting.kind]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _console(width: int) -> "Console":
    """Where a table goes: a terminal, which has a width of its own, or else lines of so many characters."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)
