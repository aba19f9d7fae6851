"""q-FFL against Algorithm 2 of the paper in float64, and what clients cannot do by what they tell."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, average
from fedlora.strategy import Sender, load
from tests.support.adapters import factors

LOSSES = st.lists(st.floats(0.5, 4.0), min_size=3, max_size=3)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=3, max_size=3)


def vector(lora: LoRA) -> torch.Tensor:
    return torch.cat([t.flatten() for _, _, t in lora.matrices()])


def told(losses: list[float | None]) -> list[Sender]:
    return [Sender(i, 1, loss=loss) for i, loss in enumerate(losses)]


def paper(q: float, L: float, losses: list[float], weights: list[float]) -> torch.Tensor:
    """w - sum_k Delta_k / sum_k h_k with Delta = F^q L d and h = q F^(q-1) |L d|^2 + L F^q."""
    w = vector(factors(0))
    d = [w - vector(factors(1 + i)) for i in range(3)]
    deltas = [p * F**q * L * x for p, F, x in zip(weights, losses, d, strict=True)]
    hs = [
        p * (q * F ** (q - 1) * float((L * x).square().sum()) + L * F**q)
        for p, F, x in zip(weights, losses, d, strict=True)
    ]
    return w - sum(deltas) / sum(hs)


@settings(max_examples=25)
@given(st.floats(0, 5), st.floats(1e-3, 10), LOSSES, WEIGHTS)
def test_it_is_the_papers_step(q: float, L: float, losses: list[float], weights: list[float]) -> None:
    strategy = load("q_ffl", q=q, lipschitz=L)
    after = strategy.aggregate(factors(0), [factors(1 + i) for i in range(3)], weights, told([*losses]))
    assert_close(vector(after), paper(q, L, losses, weights), rtol=1e-9, atol=1e-9)


@settings(max_examples=25)
@given(LOSSES, WEIGHTS)
def test_q_of_zero_is_the_mean_of_fedit(losses: list[float], weights: list[float]) -> None:
    updates = [factors(1 + i) for i in range(3)]
    after = load("q_ffl", q=0.0, lipschitz=3.0).aggregate(factors(0), updates, weights, told([*losses]))
    assert_close(vector(after), vector(average(updates, weights)), rtol=1e-12, atol=1e-12)


def test_a_loss_beyond_all_others_counts_as_ten_times_their_median() -> None:
    updates = [factors(1 + i) for i in range(3)]
    liar = load("q_ffl").aggregate(factors(0), updates, [1.0] * 3, told([1.0, 1.0, 1e6]))
    assert_close(vector(liar), vector(average(updates, [1.0, 1.0, 10.0])))


def test_a_client_that_tells_no_loss_ends_no_run() -> None:
    updates = [factors(1 + i) for i in range(3)]
    after = load("q_ffl").aggregate(factors(0), updates, [1.0] * 3, told([1.0, None, 3.0]))
    assert_close(vector(after), vector(average(updates, [1.0, 2.0, 3.0])))
    nobody = load("q_ffl").aggregate(factors(0), updates, [1.0] * 3, told([None] * 3))
    assert_close(vector(nobody), vector(average(updates, [1.0] * 3)))


@pytest.mark.parametrize(("option", "value"), [("q", -1.0), ("q", 21.0), ("lipschitz", -0.1)])
def test_an_option_out_of_bounds_is_refused(option: str, value: float) -> None:
    with pytest.raises(StrategyError, match=r"q lies in \[0, 20\]"):
        load("q_ffl", **{option: value})
