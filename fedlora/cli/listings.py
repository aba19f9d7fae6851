"""`fedlora strategies` and `fedlora settings`: what there is to choose from, as tables."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

from fedlora.config import settings as every_setting

if TYPE_CHECKING:
    from fedlora.strategy import CatalogueEntry

LEGEND = """
exact: the new model is the weighted mean of the clients' models. ranks: may those of clients differ. sums: the server
needs no single update, so its memory does not grow with the clients. Sides: A, B, R (a core), H (the head). up, down:
numbers a client sends and is sent a round and adapted module, of rank r and shape d_out x d_in, with K clients of ranks
R in all, q the rank of the newest offset, t the round from 0; the head comes on top; what a client holds is not sent.
Round any of them: aggregate.optimizer, aggregate.robust (fedlora settings); Flower's own: flwr:FedAdam and others."""


def strategies() -> None:
    """The catalogue: every strategy with its declared properties and its paper."""
    from fedlora.strategy import catalogue

    rows = [_row(entry) for entry in catalogue()]
    _print(list(rows[0]), (list(row.values()) for row in rows))
    print(LEGEND)


def _row(entry: "CatalogueEntry") -> dict[str, str]:
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
    """Every setting there is, with its default and meaning."""
    rows = ([s.key, _text(s.default), _values(s.kind), s.help] for s in every_setting())
    _print(["key", "default", "values", "meaning"], rows)


def _text(default: Any) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _values(kind: Any) -> str:
    """The values that a setting of this type takes: its choices, or the type's name."""
    if get_origin(kind) is tuple:
        return "names"
    return ", ".join(map(str, get_args(kind))) if type(kind).__name__ == "_LiteralGenericAlias" else kind.__name__


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table as wide as the terminal, or as wide as it needs to be where there is no terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=260)).print(table)
