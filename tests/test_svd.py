"""Singular values of products of factors: the quick way against the thorough one, and that against the dense one."""

from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedlora.svd import Product, _by_grams, _gram, _krylov, _through_core, svd

D_OUT, D_IN, R = 160, 144, 128  # a rank of 2 or 4 of 128 goes the quick way


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))
    return torch.as_tensor(q)


def product(spectrum: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Factors whose product has these singular values, mixed so that no factor shows them: (160, k), (k, 144)."""
    k, mix = len(spectrum), torch.Generator().manual_seed(seed)
    gauge = torch.eye(k, dtype=torch.float64) + 0.1 / k**0.5 * torch.randn(k, k, generator=mix, dtype=torch.float64)
    B = orthonormal(D_OUT, k, seed + 1) * spectrum.sqrt() @ gauge
    A = torch.linalg.solve(gauge, spectrum.sqrt()[:, None] * orthonormal(D_IN, k, seed + 2).T)
    return B.to(dtype), A.to(dtype)


def falling(by: float, n: int = R) -> Tensor:
    return torch.tensor([by**i for i in range(n)], dtype=torch.float64)


def dense(B: Tensor, A: Tensor) -> Tensor:
    return B.double() @ A.double()


def back(triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    u, s, vh = (x.double() for x in triplets)
    return torch.matmul(u * s, vh)


def best(M: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(M, full_matrices=False)
    return torch.matmul(u[:, :rank] * s[:rank], vh[:rank])


def loss(M: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> float:
    return float((M - back(triplets)).norm())


def assert_orthonormal(triplets: tuple[Tensor, Tensor, Tensor]) -> None:
    u, s, vh = triplets
    for gram in (u.T @ u, vh @ vh.T):
        assert_close(gram, torch.eye(len(s), dtype=gram.dtype), atol=2e-5, rtol=0)


def test_all_triplets_give_the_product_back() -> None:
    B, A = product(falling(0.9), dtype=torch.float64)
    u, s, vh = svd(B, A)
    assert u.shape == (D_OUT, R) and s.shape == (R,) and vh.shape == (R, D_IN)
    assert_close(back((u, s, vh)), dense(B, A), atol=1e-12, rtol=0)
    assert_close(s, falling(0.9), atol=1e-12, rtol=0)


def test_small_singular_values_keep_their_digits() -> None:
    spectrum = falling(0.75)  # down to 1e-16
    B = orthonormal(D_OUT, R, 1) * spectrum.sqrt()
    A = spectrum.sqrt()[:, None] * orthonormal(D_IN, R, 2).T
    s = svd(B, A)[1]
    assert_close(s[:60], spectrum[:60], rtol=1e-7, atol=0)  # the sixtieth is 4e-8; its square, 2e-15, has two digits


@pytest.mark.parametrize("shape", [(8, 20, 6), (6, 20, 8), (5, 3, 9), (4, 1, 4), (3, 3, 3)])
def test_a_rank_above_a_dimension_or_below_is_all_there_is(shape: tuple[int, int, int]) -> None:
    d_out, r, d_in = shape
    B, A = torch.randn(d_out, r, dtype=torch.float64), torch.randn(r, d_in, dtype=torch.float64)
    u, s, vh = svd(B, A)
    assert len(s) == min(shape)
    assert_close(back((u, s, vh)), B @ A)
    assert_close(s, torch.linalg.svdvals(B @ A)[: len(s)])
    assert_close(back(svd(B, A, 2)), best(B @ A, 2))


def test_of_rank_zero_there_is_nothing() -> None:
    u, s, vh = svd(*product(falling(0.9)), 0)
    assert u.shape == (D_OUT, 0) and s.shape == (0,) and vh.shape == (0, D_IN)


@settings(max_examples=25)
@given(st.floats(0.3, 0.95), st.integers(1, 4), st.integers(0, 99))
def test_the_leading_triplets_are_the_dense_ones(by: float, rank: int, seed: int) -> None:
    B, A = product(falling(by), seed)
    got, M = svd(B, A, rank), dense(B, A)
    assert_orthonormal(got)
    assert float((back(got) - best(M, rank)).norm()) < 1e-5 * float(M.norm())


@settings(max_examples=25)
@given(st.floats(0.3, 0.8), st.integers(2, 3), st.integers(0, 99))
def test_the_quick_way_is_taken_on_falling_spectra_and_agrees_with_the_thorough_one(
    by: float, rank: int, seed: int
) -> None:
    B, A = product(falling(by), seed)
    quick, thorough = _krylov(B, A, rank, inf, R // (8 * rank)), _through_core(B, A, rank)
    assert quick is not None
    assert_orthonormal(quick)
    assert_close(quick[1], thorough[1], rtol=1e-5, atol=0)
    assert float((back(quick) - back(thorough)).norm()) < 1e-5 * float(thorough[1].norm())


@pytest.mark.parametrize("by", [0.97, 0.999, 1.0])
def test_a_flat_spectrum_is_refused_by_the_quick_way_and_right_all_the_same(by: float) -> None:
    B, A = product(falling(by))
    assert _krylov(B, A, 4, inf, 4) is None
    got, M = svd(B, A, 4), dense(B, A)
    assert_orthonormal(got)
    assert loss(M, got) == pytest.approx(float((M - best(M, 4)).norm()), rel=1e-6)


@settings(max_examples=20)
@given(st.floats(0, 1e-2), st.sampled_from([0.5, 0.8]), st.integers(0, 99))
def test_nearly_equal_singular_values_at_the_cut_lose_no_more_than_they_must(gap: float, by: float, seed: int) -> None:
    spectrum = falling(by)
    spectrum[4] = spectrum[3] * (1 - gap)
    B, A = product(spectrum.sort(descending=True).values, seed)
    got, M = svd(B, A, 4), dense(B, A)
    assert_orthonormal(got)
    assert loss(M, got) == pytest.approx(float((M - best(M, 4)).norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("true", [0, 1, 3, 4, 5])
def test_a_product_of_lower_rank_than_its_factors_is_no_trap(true: int, rank: int) -> None:
    shared = torch.randn(true, D_IN, generator=torch.Generator().manual_seed(0))
    mixing = torch.randn(R, true, generator=torch.Generator().manual_seed(1))
    B, A = torch.randn(D_OUT, R, generator=torch.Generator().manual_seed(2)), mixing @ shared
    got, M = svd(B, A, rank), dense(B, A)
    assert_orthonormal(got)
    assert bool(torch.isfinite(back(got)).all())
    assert float((back(got) - best(M, rank)).norm()) <= 1e-5 * float(M.norm())


def test_factors_of_many_clients_that_share_a_start_go_the_quick_way() -> None:
    g = torch.Generator().manual_seed(0)
    start = torch.rand(2, D_IN, generator=g) * 2 - 1
    B = torch.cat([torch.randn(D_OUT, 2, generator=g) * 0.3 + orthonormal(D_OUT, 2, 5) for _ in range(64)], 1).float()
    A = torch.cat([start + 0.1 * torch.randn(2, D_IN, generator=g) for _ in range(64)])
    quick = _krylov(B, A, 2, inf, 8)
    assert quick is not None
    assert float((back(quick) - best(dense(B, A), 2)).norm()) < 1e-5 * float(quick[1].norm())


@settings(max_examples=30)
@given(st.floats(0.3, 1), st.floats(0.01, 0.999), st.sampled_from([torch.float32, torch.float64]))
def test_with_an_energy_the_fewest_that_hold_it_are_kept(by: float, share: float, dtype: torch.dtype) -> None:
    B, A = product(falling(by), dtype=dtype)
    held = torch.linalg.svdvals(dense(B, A)).square().cumsum(0)
    target = (share + 1e-6) * float(held[-1])  # a little off what may be equal
    got = svd(B, A, energy=target)
    assert len(got[1]) == int((held < target).sum()) + 1
    assert_orthonormal(got)
    assert loss(dense(B, A), got) == pytest.approx(
        float((held[-1] - held[len(got[1]) - 1]).clamp_min(0).sqrt()), abs=1e-4
    )


def test_an_energy_that_few_hold_is_found_though_a_flat_tail_follows() -> None:
    spectrum = torch.cat([falling(0.5, 3), torch.full((R - 3,), 0.01, dtype=torch.float64)])
    B, A = product(spectrum)
    quick = _krylov(B, A, 5, 0.97 * float(spectrum.square().sum()), 3)
    assert quick is not None and len(quick[1]) == 3
    assert float((back(quick) - best(dense(B, A), 3)).norm()) < 1e-5


def test_an_energy_is_held_by_no_more_than_the_rank() -> None:
    B, A = product(falling(0.9))
    assert [len(svd(B, A, rank, energy)[1]) for rank, energy in ((3, 1e9), (3, 1.5), (100, 1e9))] == [3, 2, 100]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    B, A = product(falling(0.7), dtype=dtype)
    got = svd(B, A, 2)
    assert {x.dtype for x in got} == {torch.float32}
    assert float((back(got) - best(dense(B, A), 2)).norm()) < 1e-5


def test_float64_is_right_to_its_own_rounding() -> None:
    B, A = product(falling(0.7), dtype=torch.float64)
    assert float((back(svd(B, A, 2)) - best(B @ A, 2)).norm()) < 1e-12


def test_the_same_factors_give_the_same_bits() -> None:
    B, A = product(falling(0.7))
    torch.manual_seed(1)
    once = svd(B, A, 2)
    torch.manual_seed(2)
    assert all(torch.equal(x, y) for x, y in zip(once, svd(B, A, 2), strict=True))


@settings(max_examples=40)
@given(st.floats(0.97, 1), st.integers(1, R), st.integers(0, 99))
def test_from_gram_matrices_the_loss_is_within_its_bound_of_the_least(by: float, rank: int, seed: int) -> None:
    B, A = product(falling(by), seed)
    got, M = _by_grams(Product(B, A), rank, inf), dense(B, A)
    if got is not None:
        assert_orthonormal(got)
        least = float((M - best(M, rank)).norm())
        assert least * (1 - 1e-6) <= loss(M, got) <= least * (1 + 5e-4)


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 100])
def test_a_flat_spectrum_is_left_to_the_gram_matrices(rank: int) -> None:
    B, A = product(falling(0.999))
    got, thorough, M = _by_grams(Product(B, A), rank, inf), _through_core(B, A, rank), dense(B, A)
    assert got is not None
    assert_close(got[1], thorough[1], rtol=1e-5, atol=0)
    assert loss(M, got) == pytest.approx(float((M - best(M, rank)).norm()), rel=1e-6)
    assert all(map(torch.equal, svd(B, A, rank), got)) or rank == 1


@pytest.mark.parametrize("by", [0.3, 0.6])
def test_what_is_left_of_a_falling_spectrum_is_too_little_for_the_gram_matrices(by: float) -> None:
    assert _by_grams(Product(*product(falling(by))), 8, inf) is None


def test_gram_matrices_are_not_for_float64_nor_for_more_than_full_rank() -> None:
    assert _by_grams(Product(*product(falling(1.0), dtype=torch.float64)), 4, inf) is None
    g = torch.Generator().manual_seed(0)
    assert _by_grams(Product(torch.randn(20, 30, generator=g), torch.randn(30, 40, generator=g)), 4, inf) is None


@pytest.mark.parametrize("directions", [1, 20, 100])
def test_factors_that_share_directions_have_gram_matrices_all_the_same(directions: int) -> None:
    g = torch.Generator().manual_seed(0)
    B = torch.randn(D_OUT, directions, generator=g) @ torch.randn(directions, R, generator=g)
    A = torch.randn(R, directions, generator=g) @ torch.randn(directions, D_IN, generator=g)
    for rank in (1, 8, 60):
        got, M = svd(B, A, rank), dense(B, A)
        assert_orthonormal(got)
        assert float((back(got) - best(M, rank)).norm()) <= 1e-5 * float(M.norm())


@given(st.integers(0, 9), st.integers(1, 30), st.integers(0, 99))
def test_the_energy_is_the_squared_norm_and_a_gram_matrix_is_the_product(rank: int, d: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((d, rank), (rank, d + 1)))
    assert_close(_gram(A), A @ A.T)
    assert Product(B, A).energy == pytest.approx(float((B @ A).square().sum()))


def test_a_tie_at_the_cut_is_no_reason_to_go_on() -> None:
    spectrum = torch.cat([torch.ones(4, dtype=torch.float64), torch.full((R - 4,), 0.001, dtype=torch.float64)])
    B, A = product(spectrum)
    quick = _krylov(B, A, 3, inf, 3)
    assert quick is not None
    assert loss(dense(B, A), quick) == pytest.approx(float(spectrum[3:].norm()), rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12])
def test_a_product_that_is_nearly_nothing_has_triplets_all_the_same(size: float) -> None:
    B, A = product(falling(0.999))
    got = svd(size * B, A, 4)
    assert_close(got[1], size * svd(B, A, 4)[1], rtol=1e-4, atol=0)
    assert bool(torch.isfinite(back(got)).all())
