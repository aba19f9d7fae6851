"""The catalogue of strategies and the list of settings, as tables."""

from typing import Any, get_args, get_origin

from rich.console import Console
from rich.table import Table

from fedlora.config import settings as every_setting
from fedlora.strategy import CatalogueEntry, catalogue

LEGEND = """
exact: the new model is the weighted mean of the clients' models. ranks: may those of clients differ. sums: the server
needs no single update, so its memory does not grow with the clients. Sides: A, B, R (a core), H (the head). up, down:
numbers a client sends and is sent a round and adapted module, of rank r and shape d_out x d_in, with K clients of ranks
R in all, q the rank of the newest offset, t the round from 0; the head comes on top; what a client holds is not sent.
Round any of them: aggregate.optimizer, aggregate.robust (fedlora settings); Flower's own: flwr:FedAdam and others."""


def strategies() -> None:
    """Print the catalogue."""
    rows = [_row(entry) for entry in catalogue()]
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    console = _console()
    console.print(table)
    console.print(LEGEND)


def _row(entry: CatalogueEntry) -> dict[str, str]:
    """What a strategy declares, by the heading of its column."""
    made, (trains, sends) = entry.default, entry.sides
    return {
        "name": entry.name,
        "strategy": entry.title,
        "exact": _yes(made.exact),
        "ranks": "mixed" if made.mixed_ranks else "alike",
        "sums": _yes(made.sums_only),
        "trains": trains,
        "sends": sends,
        "kinds": " ".join(made.kinds),
        "up": made.up or "?",
        "down": made.down or "?",
        "options": entry.options or "none",
        "paper": entry.paper,
    }


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def settings() -> None:
    """Print every dotted key."""
    table = Table("key", "default", "values", "meaning", box=None, pad_edge=False)
    for setting in every_setting():
        default = ",".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)
        table.add_row(setting.key, default, _values(setting.kind), setting.help)
    _console().print(table)


def _values(kind: Any) -> str:
    """The values that a setting of this type takes: its choices, or the type's name."""
    if get_origin(kind) is tuple:
        return "names"
    return ", ".join(map(str, get_args(kind))) if type(kind).__name__ == "_LiteralGenericAlias" else kind.__name__


def _console() -> Console:
    """A console as wide as the terminal, or as wide as the tables need where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=260)
