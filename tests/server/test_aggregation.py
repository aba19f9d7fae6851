"""Updates as they arrive."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.testing import assert_close

from fedlora.errors import Failure, FailureKind
from fedlora.lora import LoRA, average
from fedlora.server.aggregation import WeightedSum, collect
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
    got = collect(jobs, some.items(), weigh, sums=True, keep=False)
    assert len(got.updates) == 1 and got.weights == [6.0] and not got.each
    assert got.loss == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6)


def test_without_sums_updates_come_in_the_order_of_the_jobs() -> None:
    jobs = {i: Job(fresh()) for i in (0, 1, 2)}
    some = updates(3)
    got = collect(jobs, [(i, some[i]) for i in (2, 0, 1)], weigh, sums=False, keep=False)
    assert [u is some[i].lora for i, u in enumerate(got.updates)] == [True] * 3 and got.weights == [1.0, 2.0, 3.0]


def test_who_failed_and_who_is_missing_are_named() -> None:
    jobs = {i: Job(fresh()) for i in range(3)}
    got = collect(jobs, [(0, Failure("no power")), (2, updates(3)[2])], weigh, sums=True, keep=True)
    assert got.failed == {0: Failure("no power"), 1: Failure("no answer", FailureKind.LATE)}
    assert got.answered == 1 and list(got.each) == [2]


def test_a_sketch_is_put_back_where_it_was_cut_out() -> None:
    start = factors(9)
    job = Job(start, sketch={m: [1, 3] for m in start.A})
    back = LoRA(
        {m: torch.ones(2, a.shape[1]) for m, a in start.A.items()},
        {m: torch.ones(b.shape[0], 2) for m, b in start.B.items()},
    )
    got = collect({0: job}, [(0, Update(back, 1, 0.0))], weigh, sums=False, keep=False).updates[0]
    for m, a in start.A.items():
        assert torch.equal(got.A[m][[1, 3]], torch.ones(2, a.shape[1])) and torch.equal(
            got.A[m][[0, 2]], a[[0, 2]].float()
        )
        assert torch.equal(got.B[m][:, [0, 2]], start.B[m][:, [0, 2]].float())
