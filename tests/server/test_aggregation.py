"""Updates as they arrive."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.testing import assert_close

from fedlora.errors import Failure, FailureKind
from fedlora.lora import LoRA, average, scale
from fedlora.privacy.client_level import ClippedSum
from fedlora.server.aggregation import CappedSum, UpdateRules, WeightedSum, capped, collect
from fedlora.strategy import Job, Update
from tests.support.adapters import factors, fresh


def updates(n: int, dtype: torch.dtype = torch.float32) -> dict[int, Update]:
    return {i: Update(factors(i, dtype=dtype), examples=i + 1, loss=float(i)) for i in range(n)}


def weigh(update: Update) -> float:
    return float(update.examples)


@given(n=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_sum_is_the_same_to_the_last_bit_whoever_comes_first(n: int, seed: int) -> None:
    there, back = WeightedSum(), WeightedSum()
    items = list(updates(n).values())
    for u in items:
        there.add(u.lora, weigh(u))
    Random(seed).shuffle(items)
    for u in items:
        back.add(u.lora, weigh(u))
    assert there.weight == back.weight
    for s in "ABH":
        assert all(torch.equal(t, back.mean().side(s)[m]) for m, t in there.mean().side(s).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_mean_is_the_average_in_float32_or_wider(dtype: torch.dtype) -> None:
    total, some = WeightedSum(), updates(5, dtype)
    for u in some.values():
        total.add(u.lora, weigh(u))
    want = average([u.lora for u in some.values()], [weigh(u) for u in some.values()])
    assert_close(total.mean().A, want.A)
    assert total.mean().A["q"].dtype == torch.promote_types(dtype, torch.float32)


@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_ranks_that_differ_are_summed_as_if_zeros_stood_beside(ranks: list[int]) -> None:
    total = WeightedSum()
    for i, r in enumerate(ranks):
        total.add(factors(i, r), 1.0)
    want = sum(pad(factors(i, r).A["q"], (0, 0, 0, max(ranks) - r)) for i, r in enumerate(ranks)) / len(ranks)
    assert_close(total.mean().A["q"], want)
    assert total.mean().B["q"].shape == (8, max(ranks))


def test_with_sums_no_update_is_held() -> None:
    jobs = {i: Job(fresh()) for i in range(3)}
    some = updates(3)
    got = collect(jobs, some.items(), UpdateRules(), sums=True, keep=False)
    assert len(got.updates) == 1 and got.weights == [6.0] and not got.each
    assert got.loss == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)


def test_without_sums_updates_come_in_the_order_of_the_jobs() -> None:
    jobs = {i: Job(fresh()) for i in (0, 1, 2)}
    some = updates(3)
    got = collect(jobs, [(i, some[i]) for i in (2, 0, 1)], UpdateRules(), sums=False, keep=False)
    assert [u is some[i].lora for i, u in enumerate(got.updates)] == [True] * 3 and got.weights == [1.0, 2.0, 3.0]


def test_who_failed_and_who_is_missing_are_named() -> None:
    jobs = {i: Job(fresh()) for i in range(3)}
    got = collect(jobs, [(0, Failure("no power")), (2, updates(3)[2])], UpdateRules(), sums=True, keep=True)
    assert got.failed == {0: Failure("no power"), 1: Failure("no answer", FailureKind.LATE)}
    assert got.answered == 1 and list(got.each) == [2]


def test_a_sketch_is_put_back_where_it_was_cut_out() -> None:
    start = factors(9)
    job = Job(start, sketch={m: [1, 3] for m in start.A})
    back = LoRA(
        {m: torch.ones(2, a.shape[1]) for m, a in start.A.items()},
        {m: torch.ones(b.shape[0], 2) for m, b in start.B.items()},
    )
    got = collect({0: job}, [(0, Update(back, 1, 0.0))], UpdateRules(), sums=False, keep=False).updates[0]
    for m, a in start.A.items():
        assert torch.equal(got.A[m][[1, 3]], torch.ones(2, a.shape[1])) and torch.equal(
            got.A[m][[0, 2]], a[[0, 2]].float()
        )
        assert torch.equal(got.B[m][:, [0, 2]], start.B[m][:, [0, 2]].float())


def test_who_claims_a_trillion_examples_has_half_of_the_mean_and_no_more() -> None:
    jobs, some = {i: Job(fresh()) for i in range(3)}, updates(3)
    some[2] = replace(some[2], examples=10**12)
    for sums in (True, False):
        got = collect(jobs, some.items(), UpdateRules(max_share=0.5), sums=sums, keep=False)
        want = average([u.lora for u in some.values()], [1.0, 2.0, 3.0])
        assert_close(average(got.updates, got.weights).A, want.A)
        assert got.loss == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)


@given(weights=st.lists(st.integers(1, 10**12), min_size=3, max_size=9), share=st.floats(0.5, 1.0))
def test_no_weight_of_three_or_more_is_above_the_largest_share(weights: list[int], share: float) -> None:
    lowered = capped([float(w) for w in weights], share)
    assert max(lowered) <= sum(lowered) * share * (1 + 1e-9)
    total, ones = CappedSum(share), factors(0)
    for w in weights:
        total.add(ones, float(w))
    assert total.total().weight == pytest.approx(sum(lowered))


@given(weights=st.lists(st.integers(1, 10**12), min_size=1, max_size=2))
def test_of_two_clients_none_is_lowered(weights: list[int]) -> None:
    assert capped([float(w) for w in weights], 0.5) == weights


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"examples": 0}, "of 0 examples"),
        ({"loss": 1.7e308}, "loss is 1.7e+308"),
        ({"loss": -1e308, "examples": 10**12}, "loss is -1e+308"),
        ({"loss": float("nan")}, "loss is nan"),
        ({"lora": scale(factors(1, dtype=torch.float32), 1e9)}, "server.largest_step = 1000"),
        ({"lora": scale(factors(1, dtype=torch.float32), float("inf"))}, "norm"),
        ({"lora": scale(factors(1, dtype=torch.float32), 2000.0)}, "times the median of its round"),
    ],
)
def test_numbers_that_cannot_be_are_their_clients_failure(bad: dict[str, Any], says: str) -> None:
    jobs, some = {i: Job(factors(9, dtype=torch.float32)) for i in range(4)}, updates(4)
    some[0] = replace(some[0], **bad)
    rules = UpdateRules(largest_step=1000.0, step_ratio=10.0)
    for sums in (True, False):
        got = collect(jobs, some.items(), rules, sums=sums, keep=False)
        assert list(got.failed) == [0] and got.answered == 3 and says in got.failed[0].reason
        assert got.failed[0].kind == FailureKind.REFUSED


def test_losses_that_sum_beyond_all_numbers_end_nothing() -> None:
    jobs, some = {i: Job(fresh()) for i in range(2)}, updates(2)
    odd = {i: replace(u, loss=1.7e308, examples=10**12) for i, u in some.items()}
    got = collect(jobs, odd.items(), UpdateRules(), sums=True, keep=False)
    assert got.answered == 0 and len(got.failed) == 2 and got.loss is None


def test_where_most_stand_still_nobody_goes_too_far() -> None:
    start = factors(9, dtype=torch.float32)
    some = {i: Update(start, 1, 0.5) for i in range(3)} | {3: updates(4)[3]}
    got = collect({i: Job(start) for i in range(4)}, some.items(), UpdateRules(step_ratio=2.0), sums=True, keep=False)
    assert got.answered == 4


def test_what_a_client_adds_to_a_clipped_sum_depends_on_no_other() -> None:
    """Else one client could have another left out, and its clip would not bound what it does."""
    start = factors(9, dtype=torch.float32)
    some = updates(4)
    some[0] = replace(some[0], lora=scale(some[0].lora, 100.0))
    jobs, hidden = {i: Job(start) for i in range(4)}, ClippedSum(1.0)
    got = collect(jobs, some.items(), UpdateRules(step_ratio=2.0), sums=True, keep=False, clipped_sum=hidden)
    assert got.answered == 4
