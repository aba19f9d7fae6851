"""The part of the data that a run uses where data.limit bounds it."""

from collections.abc import Sequence
from heapq import nsmallest
from itertools import accumulate, pairwise

from fedlora.sections import DataConfig

from .partition import keyed_places
from .rows import Rows, column_names, take
from .tables import Table


def limited(tables: Sequence[Table], data: DataConfig, key: bytes) -> list[Table]:
    """The tables with so many rows in all as data.limit says: of each a sample, in proportion to its size.

    Where the first rows are wanted (data.limit_takes), they were taken when the files were read.
    """
    if not _is_sampled(data):
        return [*tables]
    chosen = sample_of([table.rows for table in tables], data.limit, key)
    return [table.only(which) for table, which in zip(tables, chosen, strict=True)]


def limited_rows(parts: Sequence[Rows], data: DataConfig, key: bytes) -> list[Rows]:
    """The same of rows that are of no file."""
    if not _is_sampled(data):
        return [*parts]
    return [take(rows, which) for rows, which in zip(parts, sample_of(parts, data.limit, key), strict=True)]


def read_limit(data: DataConfig) -> int:
    """How many rows of each file are to be read, from the first on; 0: all."""
    return 0 if _is_sampled(data) else data.limit


def _is_sampled(data: DataConfig) -> bool:
    return data.limit > 0 and data.limit_takes == "sample"


def sample_of(parts: Sequence[Rows], limit: int, key: bytes) -> list[list[int]]:
    """The numbers of the rows of each part that are in a sample of so many of all, ascending.

    Of every part those rows are taken whose hashes, keyed, are the lowest: a row more lets in itself or another one,
    and drives at most one out.
    """
    counts = proportional([len(rows) for rows in parts], limit)
    return [_lowest(rows, count, key) for rows, count in zip(parts, counts, strict=True)]


def _lowest(rows: Rows, count: int, key: bytes) -> list[int]:
    if count >= len(rows):
        return list(range(len(rows)))
    places = keyed_places(rows, column_names(rows), key=key, purpose="data.limit")
    return sorted(nsmallest(count, range(len(rows)), key=places.__getitem__))


def proportional(sizes: Sequence[int], limit: int) -> list[int]:
    """So many things, shared out in proportion to these sizes: none gets more than its size, and each one at least.

    Of fewer things than there are sizes each gets one all the same.

    >>> proportional([100, 10, 1], 20)
    [18, 1, 1]
    """
    total = sum(sizes)
    if limit >= total:
        return [*sizes]
    ends = [limit * end // total for end in accumulate(sizes, initial=0)]
    counts = [max(1, end - begin) for begin, end in pairwise(ends)]
    for _ in range(sum(counts) - max(limit, len(sizes))):
        counts[counts.index(max(counts))] -= 1
    return counts
