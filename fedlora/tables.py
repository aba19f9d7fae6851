"""The catalogue of strategies and the list of settings, as tables."""

from typing import Any, get_args, get_origin

from rich.console import Console
from rich.table import Table

from .catalogue import catalogue
from .config import settings as every_setting

LEGEND = """
exact: the new model is the weighted mean of the clients' models. ranks: may those of clients differ. sums: the server
needs no single update, so its memory does not grow with the clients. Sides: A, B, R (a core), H (the head). up, down:
numbers a client sends and is sent a round and adapted module, of rank r and shape d_out x d_in, with K clients of ranks
R in all, q the rank of the newest offset, t the round from 0; the head comes on top; what a client holds is not sent.
Round any of them: aggregate.optimizer, aggregate.robust (fedlora settings); Flower's own: flwr:FedAdam and others."""
COLUMNS = "name", "strategy", "exact", "ranks", "sums", "trains", "sends", "kinds", "up", "down", "options", "paper"


def strategies() -> None:
    """Print the catalogue."""
    columns = (
        "name",
        "strategy",
        "exact",
        "ranks",
        "sums",
        "trains",
        "sends",
        "kinds",
        "up",
        "down",
        "options",
        "paper",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for entry in catalogue():
        made, (trains, sends) = entry.default, entry.sides
        table.add_row(
            entry.name,
            entry.title,
            "yes" if made.exact else "no",
            "mixed" if made.mixed_ranks else "alike",
            "yes" if made.sums_only else "no",
            trains,
            sends,
            " ".join(made.kinds),
            made.up or "?",
            made.down or "?",
            entry.options or "none",
            entry.paper,
        )
    console = _console()
    console.print(table)
    console.print(LEGEND)


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
    return console if console.is_terminal else Console(highlight=False, width=260)
