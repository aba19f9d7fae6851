"""Which rows fall to which client: the partitioners of flwr-datasets, by short names.

A partition is written as one of

    iid                even shares, at random
    dirichlet:ALPHA    every class is shared out by a draw from Dirichlet(ALPHA); a small ALPHA sets the clients apart
    labels:N           every client has exactly N classes
    natural:COLUMN     one client for every value of the column
    size:SKEW          at random; client i has a share of i (linear), i^2 (square), e^i (exponential), or i^SKEW
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from math import isfinite
from random import Random
from typing import Any

from fedlora.environment import quiet_libraries
from fedlora.errors import ConfigError, DataError, nearest
from fedlora.seeds import derive

from .rows import Rows, column, take

Shares = list[list[int]]
SIZES = {"linear": "LinearPartitioner", "square": "SquarePartitioner", "exponential": "ExponentialPartitioner"}


@dataclass(frozen=True, eq=False)
class Draw:
    """One partition to be made."""

    rows: Rows
    spec: str
    clients: int
    label: str | None
    seed: int

    @property
    def parameter(self) -> str:
        """What stands behind the colon."""
        return self.spec.partition(":")[2]

    def wrong(self, takes: str) -> ConfigError:
        """The error of a parameter that is not what this partition takes."""
        return ConfigError(f'data.partition = "{self.spec}": {takes}')

    def classes(self) -> list[int]:
        """The class of every row, counted from 0 in the order of their names."""
        if self.label is None:
            raise ConfigError(f'data.partition = "{self.spec}" needs a column that holds the class; set data.label')
        return _codes(column(self.rows, self.label))


def split(rows: Rows, spec: str, clients: int, label: str | None, seed: int) -> Shares:
    """The rows of each client, in order: every row falls to exactly one client, and every client has at least one.

    `spec` is as in the head of this module, or `auto`, which is `iid`; `label` is the column that holds the class;
    `natural:COLUMN` takes 0 clients for as many as there are values. Nothing but the arguments decides the draw.
    Raises `ConfigError` for a spec that is not one, and `DataError` where these rows cannot be shared out that way.
    """
    name = spec.partition(":")[0]
    if name not in SPECS:
        raise ConfigError(f'data.partition = "{spec}": there is no such partition; {nearest(name, SPECS)}')
    if name != "natural" and not 1 <= clients <= len(rows):
        raise DataError(f"{len(rows)} examples cannot be shared among {clients} clients; ask for 1 to {len(rows)}")
    shares = [sorted(share) for share in SPECS[name](Draw(rows, spec, clients, label, seed))]
    if sorted(i for share in shares for i in share) != list(range(len(rows))) or not all(shares):
        raise DataError(f'data.partition = "{spec}" leaves out a row or a client; ask for fewer clients, or for iid')
    return shares


def hold_out(
    parts: Sequence[Rows], share: float, seed: int, purpose: str, first: int = 0
) -> tuple[list[Rows], list[Rows]]:
    """Every part without a share of its rows, and these: none where the share is 0, else one or more but never all.

    `first` is the number of the first part, by which its rows are drawn.

    Raises `DataError` for a part of a single row.
    """
    kept, held = [], []
    for n, rows in enumerate(parts, first):
        if share and len(rows) < 2:
            raise DataError(
                f"{purpose} = {share:g} takes the one example of client {n}; "
                f"ask for fewer clients, give it more examples, or set {purpose} = 0"
            )
        count = max(1, min(len(rows) - 1, round(share * len(rows)))) if share else 0
        out = set(Random(derive(seed, purpose, n)).sample(range(len(rows)), count))
        kept.append(take(rows, [i for i in range(len(rows)) if i not in out]))
        held.append(take(rows, sorted(out)))
    return kept, held


def _iid(draw: Draw) -> Shares:
    if draw.parameter:
        raise draw.wrong("iid takes no parameter")
    return _shares(draw, "IidPartitioner", num_partitions=draw.clients)


def _dirichlet(draw: Draw) -> Shares:
    alpha = _positive(draw, "dirichlet takes a number above 0, as in dirichlet:0.5")
    options: dict[str, Any] = {"alpha": alpha, "partition_by": "by", "min_partition_size": 1, "seed": draw.seed}
    return _shares(draw, "DirichletPartitioner", draw.classes(), num_partitions=draw.clients, **options)


def _labels(draw: Draw) -> Shares:
    """Deal the classes like cards, and cut each class into as many pieces as it has clients.

    Not flwr-datasets' PathologicalPartitioner, which drops the rows of every class that no client happened to draw.
    """
    if not draw.parameter.isdecimal() or int(draw.parameter) < 1:
        raise draw.wrong("labels takes the number of classes of a client, as in labels:2")
    each, classes, rng = int(draw.parameter), draw.classes(), Random(derive(draw.seed, "labels"))
    known = len(set(classes))
    if each > known:
        raise DataError(f'data.partition = "{draw.spec}": there are only {known} classes; ask for {known} or fewer')
    if each * draw.clients < known:
        raise DataError(
            f'data.partition = "{draw.spec}": {draw.clients} clients of {each} classes cannot hold all {known}; '
            f"ask for {-(-known // each)} clients or more, or for labels:{-(-known // draw.clients)}"
        )
    rows: dict[int, list[int]] = {k: [] for k in range(known)}
    for i in rng.sample(range(len(classes)), len(classes)):
        rows[classes[i]].append(i)
    hands = _deal(known, each, draw.clients, rng)
    holders = Counter(k for hand in hands for k in hand)
    for k, n in holders.items():
        if n > len(rows[k]):
            few = f"{n} clients would share a class of {len(rows[k])} examples; ask for fewer clients"
            raise DataError(f'data.partition = "{draw.spec}": {few}')
    pieces = {k: iter([rows[k][j::n] for j in range(n)]) for k, n in holders.items()}
    return [[i for k in hand for i in next(pieces[k])] for hand in hands]


def _deal(known: int, each: int, clients: int, rng: Random) -> Shares:
    """Hands of `each` different classes, from one deck after another, so that all classes are held about as often."""
    hands: Shares = []
    deck: list[int] = []
    for _ in range(clients):
        hand: list[int] = []
        while len(hand) < each:
            # cards are taken from the end: what the hand already has lies at the bottom of the new deck
            deck = deck or sorted(rng.sample(range(known), known), key=lambda k: k not in hand)
            hand.append(deck.pop())
        hands.append(hand)
    return hands


def _natural(draw: Draw) -> Shares:
    if not draw.parameter:
        raise draw.wrong("natural takes the column that says whose a row is, as in natural:user")
    owners = column(draw.rows, draw.parameter)
    if None in owners:
        few = f"{owners.count(None)} of {len(owners)} examples have no {draw.parameter}"
        raise DataError(f'data.partition = "{draw.spec}": {few}; give them one, or leave them out')
    codes = _codes(owners)
    if draw.clients not in (0, len(set(codes))):
        raise ConfigError(
            f'clients = {draw.clients}, but column "{draw.parameter}" names {len(set(codes))}; leave clients at 0'
        )
    return _shares(draw, "NaturalIdPartitioner", codes, partition_by="by")


def _size(draw: Draw) -> Shares:
    if draw.parameter in SIZES:
        return _shares(draw, SIZES[draw.parameter], num_partitions=draw.clients)
    power = _positive(draw, f"size takes {', '.join(SIZES)} or a number above 0, as in size:1.5")
    clients = draw.clients
    return _shares(draw, "IdToSizeFncPartitioner", num_partitions=clients, partition_id_to_size_fn=lambda i: i**power)


def _positive(draw: Draw, takes: str) -> float:
    try:
        value = float(draw.parameter)
    except ValueError as e:
        raise draw.wrong(takes) from e
    if not (value > 0 and isfinite(value)):
        raise draw.wrong(takes)
    return value


def _codes(values: Sequence[Any]) -> list[int]:
    """The values as numbers from 0, in the order of their names, numbers before and among themselves by size."""
    names = [value if isinstance(value, int) else str(value) for value in values]
    order = sorted(set(names), key=lambda v: (0, v, "") if isinstance(v, int) else (1, 0, v))
    code = {name: i for i, name in enumerate(order)}
    return [code[name] for name in names]


def _shares(draw: Draw, partitioner: str, by: Sequence[int] = (), **options: Any) -> Shares:
    """What one of flwr-datasets' partitioners makes of the rows, which it is given shuffled by the seed."""
    quiet_libraries()
    from datasets import Dataset
    from flwr_datasets import partitioner as partitioners

    make = getattr(partitioners, partitioner)(**options)
    order = Random(derive(draw.seed, "partition")).sample(range(len(draw.rows)), len(draw.rows))
    make.dataset = Dataset.from_dict({"row": order, "by": [by[i] for i in order] if by else order})
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # it warns at every try, and draws a bar
            warnings.simplefilter("ignore")
            return [list(make.load_partition(i)["row"]) for i in range(make.num_partitions)]
    except ValueError as e:
        raise DataError(
            f'data.partition = "{draw.spec}" leaves one of {draw.clients} clients with none of {len(draw.rows)} '
            f"examples; ask for fewer clients, or for {'a larger alpha' if by else 'a gentler size, or iid'}"
        ) from e


SPECS: dict[str, Callable[[Draw], Shares]] = {
    "auto": _iid,
    "iid": _iid,
    "dirichlet": _dirichlet,
    "labels": _labels,
    "natural": _natural,
    "size": _size,
}
