"""The clients' data as a report shows them: how many rows, and of which classes, as a heat map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.errors import cut

from .client_scores import label_counts
from .run_record import RunRecord

MOST_CLIENTS, MOST_CLASSES = 30, 24  # rows and columns of the map
WITH_NUMBERS = 8  # columns up to which a cell has its number in it
LONGEST = 24  # characters of a class in the head of the map


@dataclass(frozen=True)
class Cell:
    """A class at a client."""

    share: float  # of the client's rows, 0 to 1
    depth: float  # the same as a part of the largest share in the map: how dark the cell is
    said: str  # the same in words


@dataclass(frozen=True)
class MapRow:
    """A client's row in the heat map."""

    client: str
    rows: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class HeatMap:
    """The share of every class in each client's rows."""

    classes: Sequence[str]
    rows: Sequence[MapRow]
    most: float  # the largest share
    with_numbers: bool
    skew: str  # how unlike the clients are, in a sentence
    left_out: str  # what the map has no room for, in a sentence


def heat_map(run: RunRecord) -> HeatMap | None:
    """The map of a run; None where its data have no classes, or they are not known or not to be told."""
    counts = {client: row for client, row in label_counts(run).items() if sum(row)}
    if not counts:
        return None
    names = list(run.inputs["data"]["classes"])
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    shown = sorted(sorted(range(len(names)), key=lambda k: -totals[k])[:MOST_CLASSES])
    unlike = {client: _distance(row, totals) for client, row in counts.items()}
    clients = sorted(counts, key=lambda client: -unlike[client])[:MOST_CLIENTS]
    most = _largest_share([counts[client] for client in clients], shown)
    return HeatMap(
        classes=[cut(names[k], LONGEST) for k in shown],
        rows=[_row(run, client, counts[client], shown, most) for client in sorted(clients)],
        most=most,
        with_numbers=len(shown) <= WITH_NUMBERS,
        skew=_skew(unlike),
        left_out=_left_out(len(counts) - len(clients), len(names) - len(shown)),
    )


def _largest_share(rows: Sequence[Sequence[int]], shown: Sequence[int]) -> float:
    """The largest share that a class which is `shown` has of a client's rows; 1 where none has any."""
    return max(max(row[k] for k in shown) / sum(row) for row in rows) or 1.0


def _row(run: RunRecord, client: int, counts: Sequence[int], shown: Sequence[int], most: float) -> MapRow:
    """A client's row: the classes that are `shown`, of whose shares `most` is the largest in the map."""
    rows = sum(counts)
    cells = [Cell(counts[k] / rows, counts[k] / rows / most, f"{counts[k]:,} of {rows:,} rows") for k in shown]
    return MapRow(run.name_of(client), f"{rows:,}", cells)


def _distance(counts: Sequence[int], totals: Sequence[int]) -> float:
    """The share of a client's rows that would need another class for it to be like all clients together."""
    own, every = sum(counts), sum(totals)
    return sum(abs(n / own - total / every) for n, total in zip(counts, totals, strict=True)) / 2


def _skew(unlike: Mapping[int, float]) -> str:
    mean = sum(unlike.values()) / len(unlike)
    return (
        f"For a client's labels to be spread like those of all together, {100 * mean:.0f} % of its rows would need "
        f"another label, in the mean over clients; {100 * max(unlike.values()):.0f} % at the client most unlike."
    )


def _left_out(clients: int, classes: int) -> str:
    """What has no room in the map; empty where all has."""
    told = []
    if clients:
        told.append(f"the {MOST_CLIENTS} clients most unlike all together; {clients:,} others are not shown")
    if classes:
        told.append(f"the {MOST_CLASSES} most frequent classes; {classes:,} others are not shown")
    return f"Shown are {' and '.join(told)}." if told else ""


def data_lines(run: RunRecord) -> list[str]:
    """The data in words: rows, columns, adapter's reach, and why something is not told."""
    data = run.inputs.get("data", {})
    if not data:
        return ["Nothing was kept about the data (the run has no inputs.json)."]
    used = ", ".join(data["used"])
    lines = [_sizes(data["sizes"])] if data["sizes"] else []
    lines.append(
        f"Columns that were used: {used} (data of kind {data['kind']}); {data['evaluation']:,} evaluation rows."
    )
    if run.is_private:
        lines.append("How the clients' labels are spread is not shown, as the run is private.")
    elif run.is_deployed:
        lines.append("What the clients' data look like stays with them, and so is not here.")
    return lines


def _sizes(sizes: Sequence[int]) -> str:
    ordered = sorted(sizes)
    return (
        f"{sum(sizes):,} training rows of {len(sizes):,} clients: the smallest has {ordered[0]:,}, the median one "
        f"{ordered[len(ordered) // 2]:,}, the largest {ordered[-1]:,}."
    )
