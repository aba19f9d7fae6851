"""The algebra on factors, against the dense products it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.lora import LoRA, average, compact, contrast, delta, inner, join, scale, stack, truncate
from tests.conftest import factors

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def dense(loras: list[LoRA], weights: list[float]) -> dict[str, torch.Tensor]:
    products = [delta(x) for x in loras]
    return {m: sum(w * p[m] for w, p in zip(weights, products, strict=True)) / sum(weights) for m in products[0]}


@given(WEIGHTS, st.integers(1, 6))
def test_stack_is_the_weighted_mean_of_products(weights: list[float], rank: int) -> None:
    loras = [factors(i, rank) for i in range(len(weights))]
    assert_close(delta(stack(loras, weights)), dense(loras, weights))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_stack_takes_mixed_ranks(ranks: list[int]) -> None:
    loras = [factors(i, r) for i, r in enumerate(ranks)]
    weights = [float(r) for r in ranks]
    assert_close(delta(stack(loras, weights)), dense(loras, weights))


@given(WEIGHTS)
def test_contrast_is_what_averaging_factors_loses(weights: list[float]) -> None:
    loras = [factors(i) for i in range(len(weights))]
    residual, mean = contrast(loras, weights), average(loras, weights)
    got = delta(join(mean, residual)) if residual else delta(mean)
    assert_close(got, dense(loras, weights))


@given(st.integers(1, 5), st.integers(1, 4))
def test_contrast_has_rank_k_minus_one_times_r(clients: int, rank: int) -> None:
    residual = contrast([factors(i, rank) for i in range(clients)], [1.0] * clients)
    assert all(a.shape[0] == (clients - 1) * rank for a in residual.A.values())


def test_contrast_keeps_its_digits_when_clients_hardly_differ() -> None:
    base = factors(0)
    near = [
        LoRA(
            {m: a + 1e-4 * factors(i).A[m] for m, a in base.A.items()},
            {m: b + 1e-4 * factors(i).B[m] for m, b in base.B.items()},
        )
        for i in (1, 2, 3)
    ]
    exact = delta(contrast(near, [1, 1, 1]))
    single = [LoRA({m: a.float() for m, a in x.A.items()}, {m: b.float() for m, b in x.B.items()}) for x in near]
    for m, d in delta(contrast(single, [1, 1, 1])).items():
        assert (d - exact[m]).norm() < 0.02 * exact[m].norm()  # the difference of two products would be all noise


@given(st.floats(-3, 3))
def test_scale_scales_the_product(c: float) -> None:
    assert_close(delta(scale(factors(1), c)), {m: c * d for m, d in delta(factors(1)).items()})


def test_join_adds_products_and_ranks() -> None:
    x, y = factors(1, 2), factors(2, 3)
    both = join(x, y)
    assert both.A["q"].shape[0] == 5
    assert_close(delta(both), {m: delta(x)[m] + delta(y)[m] for m in x.A})


@settings(max_examples=20)
@given(st.integers(1, 6))
def test_truncate_loses_what_eckart_and_young_say(rank: int) -> None:
    lora = factors(3, rank=6)
    for m, d in delta(lora).items():
        s = torch.linalg.svdvals(d)
        lost = (d - delta(truncate(lora, rank))[m]).norm()
        assert lost == pytest.approx(float(s[rank:].norm()), abs=1e-9)


def test_truncations_are_nested() -> None:
    lora = factors(4, rank=6)
    assert_close(truncate(truncate(lora, 4), 2).B["q"].abs(), truncate(lora, 2).B["q"].abs())


def test_compact_caps_the_rank_and_keeps_the_product() -> None:
    big = join(*[factors(i) for i in range(5)])  # rank 20, dimensions of 5 to 8
    small = compact(big)
    assert {m: a.shape[0] for m, a in small.A.items()} == {"q": 6, "v": 5, "out": 6}
    assert_close(delta(small), delta(big))


def test_compact_leaves_low_ranks_alone() -> None:
    lora = factors(1, 3)
    assert compact(lora).A["q"] is lora.A["q"]


def test_inner_is_the_frobenius_product_of_the_deltas() -> None:
    x, y = factors(1, 2), factors(2, 5)
    assert inner(x, y) == pytest.approx(sum(float((delta(x)[m] * delta(y)[m]).sum()) for m in x.A))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    loras = [factors(i, dtype=dtype) for i in range(8)]
    mean = average(loras, [1.0] * 8).A["q"]
    assert mean.dtype == torch.float32
    assert_close(mean, torch.stack([x.A["q"].float() for x in loras]).mean(0))


def test_a_side_that_is_not_there_stays_away() -> None:
    only = factors(1).only("B")
    assert not only.A and not only.H and only.over(factors(2)).A["q"] is not None
    assert not average([only], [1.0]).A
