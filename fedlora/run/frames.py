"""A run's records as tables of pandas: a row a round, or a row a client and round."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .directory import GROUPS, RunDirectory

FIGURES = (
    "clients",
    "answered",
    "train_loss",
    "bytes_up",
    "bytes_down",
    "seconds",
    "clock",
)  # of a record, as they are
MORE = ("exactness", "epsilon", "epsilon_median", "clip", "next_clip", "noise_to_signal")


def rounds_frame(folder: RunDirectory, records: Sequence[Mapping[str, Any]]) -> Any:
    """A `DataFrame` with a row for every round, and one of round 0 for the evaluation before the first."""
    return _frame(folder, _rounds(records))


def clients_frame(folder: RunDirectory, records: Sequence[Mapping[str, Any]]) -> Any:
    """A `DataFrame` with a row for every client of every round, of what `each` tells; empty where it tells nothing."""
    return _frame(folder, _clients(records))


def _frame(folder: RunDirectory, rows: Iterator[dict[str, Any]]) -> Any:
    from pandas import DataFrame

    settings = folder.config()
    which = {"run": str(folder.path), "strategy": settings["strategy"], "seed": settings["seed"]}
    return DataFrame([which | row for row in rows])


def _rounds(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the figures of every round, those of a group under GROUP/NAME."""
    for record in records:
        if before := record.get("before"):
            yield {"round": 0} | {f"eval/{name}": value for name, value in before.items()}
        row = {name: record[name] for name in ("round", *FIGURES, *MORE) if name in record}
        for group in GROUPS:
            row |= {f"{group}/{name}": value for name, value in (record.get(group) or {}).items()}
        yield row


def _clients(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        names = record.get("names", {})
        for client, own in record.get("each", {}).items():
            named = {"name": names[client]} if client in names else {}
            yield {"round": record["round"], "client": int(client), **named, **own}
