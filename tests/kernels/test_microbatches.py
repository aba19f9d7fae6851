"""Micro-batches hold every row once, keep their bounds, and cost the least of all cuts there are."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlora.kernels.microbatches import Bounds, bounds, padded_tokens, plan

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=9)
BOUNDS = st.builds(Bounds, tokens=st.integers(1, 60), overhead=st.integers(0, 20), rows=st.integers(1, 9))


def cost(lengths: list[int], batches: list[list[int]], bounds: Bounds) -> int:
    return padded_tokens(lengths, batches) + bounds.overhead * len(batches)


def fits(lengths: list[int], batch: list[int], bounds: Bounds) -> bool:
    small = len(batch) <= bounds.rows and padded_tokens(lengths, [batch]) <= bounds.tokens
    return small or len(batch) == 1


def every_cut(lengths: list[int]) -> list[list[list[int]]]:
    n, order = len(lengths), sorted(range(len(lengths)), key=lengths.__getitem__)
    inner = [c for k in range(n) for c in combinations(range(1, n), k)]
    return [[order[i:j] for i, j in pairwise((0, *cuts, n))] for cuts in inner]


@given(LENGTHS, BOUNDS)
def test_no_other_cut_of_the_rows_in_order_of_length_costs_less(lengths: list[int], bounds: Bounds) -> None:
    allowed = [b for b in every_cut(lengths) if all(fits(lengths, batch, bounds) for batch in b)]
    least = min(cost(lengths, batches, bounds) for batches in allowed)
    assert cost(lengths, plan(lengths, bounds), bounds) == least


@given(LENGTHS, BOUNDS)
def test_every_row_is_in_one_micro_batch_that_keeps_the_bounds(lengths: list[int], bounds: Bounds) -> None:
    batches = plan(lengths, bounds)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(fits(lengths, batch, bounds) for batch in batches)


def test_rows_are_in_order_of_length_and_stay_in_their_order_where_they_are_as_long() -> None:
    assert plan([5, 2, 5, 2, 5], Bounds(tokens=10, overhead=0)) == [[1, 3], [0, 2], [4]]


def test_no_rows_make_no_micro_batches() -> None:
    assert plan([], Bounds(tokens=10, overhead=1)) == []


@pytest.mark.parametrize(("overhead", "batches"), [(0, 4), (1000, 1)])
def test_the_dearer_a_micro_batch_the_fewer_there_are(overhead: int, batches: int) -> None:
    assert len(plan([3, 6, 9, 12], Bounds(tokens=1000, overhead=overhead))) == batches


def test_bounds_are_the_same_whenever_they_are_asked_for() -> None:
    net = nn.Linear(4, 4)
    assert bounds(net) == bounds(net)
    assert len(plan([16] * 400, bounds(net))) == 7  # 64 rows of 16 tokens are the 1,024 that fit


def test_a_batch_of_a_hundred_thousand_rows_is_cut_without_trying_every_pair() -> None:
    lengths = [5 + (i * i) % 120 for i in range(100_000)]
    batches = plan(lengths, Bounds(tokens=1024, overhead=48))
    assert padded_tokens(lengths, batches) < 1.02 * sum(lengths)
