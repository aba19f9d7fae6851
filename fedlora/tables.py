"""The catalogue of strategies and the list of settings, as tables."""

from typing import Any, get_args, get_origin

from rich.console import Console
from rich.table import Table

from .catalogue import catalogue
from .config import settings as every_setting


def strategies() -> None:
    """Print the catalogue."""
    table = Table("name", "title", "exact", "mixed ranks", "sums only", "options", "paper", box=None, pad_edge=False)
    for entry in catalogue():
        cls = entry.cls
        marks = ("yes" if flag else "no" for flag in (cls.exact, cls.mixed_ranks, cls.sums_only))
        table.add_row(entry.name, entry.title, *marks, entry.options or "none", entry.paper)
    console = _console()
    console.print(table)
    console.print(
        "exact: the new model is the weighted mean of the clients' models; sums only: the server needs no single update"
    )


def settings() -> None:
    """Print every dotted key."""
    table = Table("key", "default", "values", "meaning", box=None, pad_edge=False)
    for s in every_setting():
        default = ",".join(s.default) if isinstance(s.default, tuple) else str(s.default)
        table.add_row(s.key, default, _kind(s.kind), s.help)
    _console().print(table)


def _kind(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "names"
    return ", ".join(map(str, get_args(kind))) if type(kind).__name__ == "_LiteralGenericAlias" else kind.__name__


def _console() -> Console:
    """As wide as the terminal, or as wide as needed where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)
