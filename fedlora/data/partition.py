"""Partitions of rows among clients: the partitioners of flwr-datasets, by short names.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, pairwise
from math import ceil, isfinite
from random import Random
from typing import Any

from fedlora.environment import configure_libraries
from fedlora.errors import ConfigError, DataError, nearest
from fedlora.seeds import derive

from .rows import Rows, column, row_hashes, take
from .schema import is_whole

Shares = list[list[int]]
SIZES = {"linear": "LinearPartitioner", "square": "SquarePartitioner", "exponential": "ExponentialPartitioner"}


@dataclass(frozen=True, eq=False)
class PartitionSpec:
    """A partition that is asked for: these rows, among so many clients."""

    rows: Rows
    spec: str  # NAME or NAME:PARAMETER, as in the head of this module
    clients: int
    label: str | None  # the column that holds the class
    seed: int

    def shuffled(self) -> list[int]:
        """The numbers of all rows, in an order by the seed."""
        return Random(derive(self.seed, "partition")).sample(range(len(self.rows)), len(self.rows))

    @property
    def parameter(self) -> str:
        """The text behind the colon; empty without a colon."""
        return self.spec.partition(":")[2]

    def wrong(self, takes: str) -> ConfigError:
        """The error for a parameter that this partition does not take."""
        return ConfigError(f'data.partition = "{self.spec}": {takes}')

    def impossible(self, why: str) -> DataError:
        """The error for rows that cannot be shared out this way."""
        return DataError(f'data.partition = "{self.spec}": {why}')

    def classes(self) -> list[int]:
        """The class of every row, counted from 0 in the order of their names."""
        if self.label is None:
            raise ConfigError(f'data.partition = "{self.spec}" needs a column that holds the class; set data.label')
        labels = column(self.rows, self.label)
        if len({isinstance(label, str) for label in labels}) == 1:
            return _codes(labels)
        return _codes([int(label) if is_whole(str(label)) else str(label) for label in labels])  # of files of two kinds


def split(rows: Rows, spec: str, *, clients: int, label: str | None, seed: int) -> Shares:
    """The numbers of each client's rows, ascending: every row falls to exactly one client, and no client has none.

    `spec` is as in the head of this module, or `auto`, which is `iid`; `label` is the column that holds the class;
    `natural:COLUMN` takes 0 clients for as many as there are values. The result depends on the arguments alone.
    Raises `ConfigError` for a spec that is not one, and `DataError` where these rows cannot be shared out that way.
    """
    name = spec.partition(":")[0]
    if name not in SPECS:
        raise ConfigError(f'data.partition = "{spec}": there is no such partition; {nearest(name, SPECS)}')
    if name != "natural" and not 1 <= clients <= len(rows):
        raise DataError(f"{len(rows)} examples cannot be shared among {clients} clients; ask for 1 to {len(rows)}")
    partition = PartitionSpec(rows, spec, clients=clients, label=label, seed=seed)
    shares = [sorted(share) for share in SPECS[name](partition)]
    if not (all(shares) and sorted(chain.from_iterable(shares)) == list(range(len(rows)))):
        raise DataError(f'data.partition = "{spec}" leaves out a row or a client; ask for fewer clients, or for iid')
    return shares


def hold_out(
    parts: Sequence[Rows], share: float, purpose: str, *, columns: Sequence[str], key: bytes
) -> tuple[list[Rows], list[Rows]]:
    """The rows that every part keeps, and the rows that are held out of it: about a share of them, one at least.

    A row is held out where the hash of its values in these columns, keyed by `key` and `purpose`, lies below the share.
    So one row more or less changes no other row's side: private training sets that differ by one record in the source
    differ by one record here. In parts of few rows there is an exception: of rows that all lie below the share the
    highest is kept, and where none does the lowest is held out. A share of 0 holds out nothing. Raises `DataError` for
    a part of a single row.
    """
    kept, held = [], []
    for n, rows in enumerate(parts):
        _check_that_some_are_left(rows, share, purpose, n)
        out = _below(keyed_places(rows, columns, key=key, purpose=purpose), share) if share else set()
        kept.append(take(rows, [i for i in range(len(rows)) if i not in out]))
        held.append(take(rows, sorted(out)))
    return kept, held


def keyed_places(rows: Rows, columns: Sequence[str], *, key: bytes, purpose: str) -> list[float]:
    """A number from 0 to 1 of every row, by its values in these columns alone; without the key it looks random."""
    hashes = (blake2b(row, key=key, person=purpose.encode(), digest_size=8) for row in row_hashes(rows, columns))
    return [int.from_bytes(h.digest()) / 2**64 for h in hashes]


def _below(places: Sequence[float], share: float) -> set[int]:
    """The numbers of the places below a share: one at least, and not all."""
    out = {i for i, place in enumerate(places) if place < share}
    by_place = sorted(range(len(places)), key=lambda i: places[i])
    return (out or {by_place[0]}) - ({by_place[-1]} if len(out) == len(places) else set())


def _check_that_some_are_left(rows: Rows, share: float, purpose: str, n: int) -> None:
    """Raise `DataError` where a share would take the one row of part n."""
    if share and len(rows) < 2:
        raise DataError(
            f"{purpose} = {share:g} takes the one example of client {n}; "
            f"ask for fewer clients, give it more examples, or set {purpose} = 0"
        )


def sample_out(
    parts: Sequence[Rows], share: float, purpose: str, *, seed: int, first: int = 0
) -> tuple[list[Rows], list[Rows]]:
    """As `hold_out`, by a seeded sample of the rows' numbers, as runs of version 0.1 have it: exactly that share.

    One row more moves others to the other side. `first` is the number of the first part; a part's number and `purpose`
    seed the draw of its rows.
    """
    kept, held = [], []
    for n, rows in enumerate(parts, first):
        _check_that_some_are_left(rows, share, purpose, n)
        out = _sample(len(rows), share, Random(derive(seed, purpose, n)))
        kept.append(take(rows, [i for i in range(len(rows)) if i not in out]))
        held.append(take(rows, sorted(out)))
    return kept, held


def _sample(n: int, share: float, rng: Random) -> set[int]:
    """A share of the numbers below n, drawn: one at least and not all, but none for a share of 0."""
    count = max(1, min(n - 1, round(share * n))) if share else 0
    return set(rng.sample(range(n), count))


def _iid(partition: PartitionSpec) -> Shares:
    """Equal shares of the shuffled rows."""
    if partition.parameter:
        raise partition.wrong("iid takes no parameter")
    order, clients = partition.shuffled(), partition.clients
    ends = [(i * (len(order) // clients) + min(i, len(order) % clients)) for i in range(clients + 1)]
    return [order[a:b] for a, b in pairwise(ends)]


def _dirichlet(partition: PartitionSpec) -> Shares:
    """Shares of every class by a draw from Dirichlet(alpha)."""
    alpha = _positive(partition, "dirichlet takes a number above 0, as in dirichlet:0.5")
    options: dict[str, Any] = {"alpha": alpha, "partition_by": "by", "min_partition_size": 1, "seed": partition.seed}
    return _shares(partition, "DirichletPartitioner", partition.classes(), num_partitions=partition.clients, **options)


def _labels(partition: PartitionSpec) -> Shares:
    """Deal the classes like cards, and cut each class into as many pieces as it has clients.

    Not flwr-datasets' PathologicalPartitioner, which drops the rows of every class that no client happened to draw.
    """
    if not partition.parameter.isdecimal() or int(partition.parameter) < 1:
        raise partition.wrong("labels takes the number of classes of a client, as in labels:2")
    per_client = int(partition.parameter)
    classes = partition.classes()
    known = len(set(classes))
    _check_deal(partition, per_client, known)
    rng = Random(derive(partition.seed, "labels"))
    rows = _shuffled_by_class(classes, rng)
    hands = _deal(known, per_client, partition.clients, rng)
    holders = Counter(chain.from_iterable(hands))
    for k, n in holders.items():
        if n > len(rows[k]):
            raise partition.impossible(
                f"{n} clients would share a class of {len(rows[k])} examples; ask for fewer clients"
            )
    pieces = {k: _pieces(rows[k], n) for k, n in holders.items()}
    return [list(chain.from_iterable(next(pieces[k]) for k in hand)) for hand in hands]


def _check_deal(partition: PartitionSpec, per_client: int, known: int) -> None:
    """Raise `DataError` if clients with so many classes each cannot hold exactly the known ones."""
    if per_client > known:
        raise partition.impossible(f"there are only {known} classes; ask for {known} or fewer")
    if per_client * partition.clients < known:
        raise partition.impossible(
            f"{partition.clients} clients of {per_client} classes cannot hold all {known}; "
            f"ask for {ceil(known / per_client)} clients or more, or for labels:{ceil(known / partition.clients)}"
        )


def _shuffled_by_class(classes: Sequence[int], rng: Random) -> dict[int, list[int]]:
    """The numbers of each class's rows, in a random order."""
    rows: dict[int, list[int]] = {}
    for i in rng.sample(range(len(classes)), len(classes)):
        rows.setdefault(classes[i], []).append(i)
    return rows


def _pieces(rows: Sequence[int], n: int) -> Iterator[Sequence[int]]:
    """The rows in n pieces of about equal size."""
    return (rows[j::n] for j in range(n))


def _deal(known: int, per_client: int, clients: int, rng: Random) -> Shares:
    """A hand of `per_client` different classes for each client, dealt from one shuffled deck of all classes after
    another, so that every class is held about as often as any other."""
    hands: Shares = []
    deck: list[int] = []
    for _ in range(clients):
        hand: list[int] = []
        while len(hand) < per_client:
            # cards are taken from the end: what the hand already has lies at the bottom of the new deck
            deck = deck or sorted(rng.sample(range(known), known), key=lambda k: k not in hand)
            hand.append(deck.pop())
        hands.append(hand)
    return hands


def _natural(partition: PartitionSpec) -> Shares:
    """One share for every value of the column that the parameter names."""
    if not partition.parameter:
        raise partition.wrong("natural takes the column that says whose a row is, as in natural:user")
    owners = column(partition.rows, partition.parameter)
    if None in owners:
        few = f"{owners.count(None)} of {len(owners)} examples have no {partition.parameter}"
        raise partition.impossible(f"{few}; give them one, or leave them out")
    codes = _codes(owners)
    count = len(set(codes))
    if partition.clients not in (0, count):
        raise ConfigError(
            f'clients = {partition.clients}, but column "{partition.parameter}" names {count}; leave clients at 0'
        )
    return _shares(partition, "NaturalIdPartitioner", codes, partition_by="by")


def _size(partition: PartitionSpec) -> Shares:
    """Shares of the shuffled rows whose sizes grow from client to client as the parameter says."""
    if partition.parameter in SIZES:
        return _shares(partition, SIZES[partition.parameter], num_partitions=partition.clients)
    power = _positive(partition, f"size takes {', '.join(SIZES)} or a number above 0, as in size:1.5")
    clients = partition.clients
    return _shares(
        partition, "IdToSizeFncPartitioner", num_partitions=clients, partition_id_to_size_fn=lambda i: i**power
    )


def _positive(partition: PartitionSpec, takes: str) -> float:
    """The parameter as a finite number above 0; raises `ConfigError` that says what the partition takes."""
    try:
        value = float(partition.parameter)
    except ValueError as e:
        raise partition.wrong(takes) from e
    if not (value > 0 and isfinite(value)):
        raise partition.wrong(takes)
    return value


def _codes(values: Sequence[Any]) -> list[int]:
    """The values as codes from 0: whole numbers first, by their size, then all others by their names."""
    keys = [(0, value, "") if isinstance(value, int) else (1, 0, str(value)) for value in values]
    codes = {key: code for code, key in enumerate(sorted(set(keys)))}
    return [codes[key] for key in keys]


def _shares(partition: PartitionSpec, partitioner: str, by: Sequence[int] = (), **options: Any) -> Shares:
    """The partition that one of flwr-datasets' partitioners makes of the rows, shuffled by the seed beforehand.

    `by` are the numbers by which it tells rows apart, as classes or owners, if it does.
    """
    configure_libraries()
    from datasets import Dataset
    from flwr_datasets import partitioner as partitioners

    make = getattr(partitioners, partitioner)(**options)
    order = partition.shuffled()
    told_apart = by or range(len(order))
    make.dataset = Dataset.from_dict({"row": order, "by": [told_apart[i] for i in order]})
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # it warns at every try, and draws a bar
            warnings.simplefilter("ignore")
            make.load_partition(0)  # of all partitions their places are then known; to load each takes a millisecond
            places = make._partition_id_to_indices
            return [[order[place] for place in places[i]] for i in range(make.num_partitions)]
    except ValueError as e:
        raise DataError(
            f'data.partition = "{partition.spec}" leaves one of {partition.clients} clients with none of '
            f"{len(partition.rows)} examples; ask for fewer clients, or for "
            f"{'a larger alpha' if by else 'a gentler size, or iid'}"
        ) from e


SPECS: dict[str, Callable[[PartitionSpec], Shares]] = {
    "auto": _iid,
    "iid": _iid,
    "dirichlet": _dirichlet,
    "labels": _labels,
    "natural": _natural,
    "size": _size,
}
