"""Intervals and differences: how often they claim what is not so, and how they hold to plain cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.comparison.statistics import difference, holm, interval

Figures = dict[int, list[float]]


def drawn(rng: np.random.Generator, mean: float, of_seed: float, of_example: float, seeds: int = 3) -> Figures:
    """Figures of 200 examples for each seed, with effects of seed and example of these sizes."""
    examples = rng.normal(0, of_example, 200)
    effects = rng.normal(0, of_seed, seeds)
    return {s: list(mean + effects[s] + examples + rng.normal(0, 0.3, 200)) for s in range(seeds)}


NONE: Figures = {s: [0.0] * 200 for s in range(3)}


@pytest.mark.parametrize(("of_seed", "of_example"), [(0.2, 0.0), (0.0, 0.5), (0.05, 0.5), (0.0, 0.0)])
def test_of_lines_that_do_not_differ_few_are_said_to(of_seed: float, of_example: float) -> None:
    rng = np.random.default_rng(0)
    ps = [difference(drawn(rng, 0, of_seed, of_example), NONE, same=True).p for _ in range(400)]
    assert np.mean(np.array(ps) < 0.05) <= 0.075  # 0.05 and two standard errors of 400 draws


def test_an_interval_over_examples_alone_would_claim_what_seeds_make() -> None:
    rng = np.random.default_rng(1)
    drawn_ones = [drawn(rng, 0, 0.2, 0.0) for _ in range(100)]
    alone = [difference({0: one[0]}, {0: NONE[0]}, same=True) for one in drawn_ones]
    assert np.mean([one.p < 0.05 for one in alone]) > 0.5 and {one.over for one in alone} == {"examples"}


def test_a_difference_that_is_there_is_found() -> None:
    rng = np.random.default_rng(2)
    found = [difference(drawn(rng, 0.3, 0.02, 0.5), NONE, same=True) for _ in range(50)]
    assert np.mean([one.p < 0.05 for one in found]) > 0.9
    assert np.mean([abs(one.mean - 0.3) < one.half for one in found]) > 0.85


def test_where_the_test_split_differs_by_seed_the_difference_is_a_paired_t_test_over_seeds() -> None:
    one = {0: [1.0, 0.0], 1: [1.0, 1.0, 0.0, 0.0], 2: [1.0]}
    other = {0: [0.0, 0.0], 1: [1.0, 0.0, 0.0, 0.0], 2: [0.5]}
    found = difference(one, other, same=False)
    d = [0.5, 0.25, 0.5]
    assert found.over == "seeds" and found.mean == pytest.approx(np.mean(d))
    assert found.half == pytest.approx(4.302653 * np.std(d, ddof=1) / np.sqrt(3))


def test_equal_lines_differ_by_nothing() -> None:
    same = {0: [1.0, 0.0, 1.0], 1: [0.0, 0.0, 1.0]}
    found = difference(same, same, same=True)
    assert (found.mean, found.half, found.p) == (0.0, 0.0, 1.0)


def test_the_interval_of_three_seeds_is_students() -> None:
    assert interval([0.7]).half is None
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(4.302653 / np.sqrt(3))


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holms_correction_keeps_the_order_and_lies_between_none_and_bonferronis(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= c <= min(1, p * len(ps)) + 1e-12 for p, c in zip(ps, corrected, strict=True))
    pairs = sorted(zip(ps, corrected, strict=True))
    assert [c for _, c in pairs] == sorted(corrected)
