"""The algebra on factors, against the dense products it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedlora import lora as algebra
from fedlora.lora import (
    LoRA,
    average,
    compact,
    delta,
    densify,
    difference,
    euclidean_norm,
    factored,
    from_matrices,
    inner,
    join,
    leading,
    map_factors,
    norm,
    orthonormal,
    principal,
    reinitialise,
    residual,
    scale,
    stack,
    truncate,
)
from tests.support.adapters import SHAPES, factors

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def sided(seed: int, rank: int, sides: str) -> LoRA:
    """A random adapter; with R in `sides` it has a core, in two heads with 2, with D a dense matrix in two modules."""
    g = torch.Generator().manual_seed(seed + 100)
    rank = 2 * rank if "2" in sides else rank
    made = factors(seed, rank)
    blocks = (2, rank // 2, rank // 2) if "2" in sides else (rank, rank)
    R = {m: torch.randn(blocks, generator=g, dtype=torch.float64) for m in SHAPES}
    D = {m: torch.randn(SHAPES[m], generator=g, dtype=torch.float64) for m in ("q", "v")}
    return LoRA(made.A, made.B, made.H, R if "R" in sides else {}, D if "D" in sides else {})


ANY = st.builds(sided, st.integers(0, 9), st.integers(1, 7), st.sampled_from(["", "R", "2R", "D", "2RD"]))


def written_out(x: LoRA) -> dict[str, Tensor]:
    """The product without `delta`, which is under test too."""
    cores = {m: torch.block_diag(*core) if core.dim() == 3 else core for m, core in x.R.items()}
    low = {m: x.B[m] @ (cores[m] @ a if m in cores else a) for m, a in x.A.items()}
    return {m: p + x.D[m] if m in x.D else p for m, p in low.items()}


def total(loras: list[LoRA], weights: list[float]) -> dict[str, Tensor]:
    products = [written_out(x) for x in loras]
    return {m: torch.stack([w * p[m] for w, p in zip(weights, products, strict=True)]).sum(0) for m in products[0]}


def dense(loras: list[LoRA], weights: list[float]) -> dict[str, Tensor]:
    return total(loras, [w / sum(weights) for w in weights])


@given(ANY)
def test_delta_is_b_r_a_and_d(x: LoRA) -> None:
    assert_close(delta(x), written_out(x))


@given(ANY)
def test_factored_keeps_the_product_and_the_head(x: LoRA) -> None:
    two = factored(x)
    assert not two.R and not two.D and two.H is x.H
    assert_close({m: two.B[m] @ two.A[m] for m in two.A}, written_out(x))


def test_a_dense_matrix_alone_is_factored_beside_the_smaller_identity() -> None:
    D = factors(1).B["q"] @ factors(1).A["q"]  # (8, 6)
    assert factored(LoRA(D={"q": D})).A["q"].shape == (6, 6)
    assert factored(LoRA(D={"q": D.T})).B["q"].shape == (6, 6)
    assert_close(delta(factored(LoRA(D={"q": D.T}))), {"q": D.T})


@given(st.lists(ANY, min_size=1, max_size=4))
def test_join_adds_products_and_ranks(some: list[LoRA]) -> None:
    both = join(*some)
    assert both.A["q"].shape[0] == sum(factored(x).A["q"].shape[0] for x in some)
    assert_close(delta(both), total(some, [1.0] * len(some)))
    assert not both.H


def test_join_takes_parts_that_know_different_modules() -> None:
    x, y = factors(1, 2), factors(2, 3)
    part = join(LoRA({"q": x.A["q"]}, {"q": x.B["q"]}), y)
    assert part.A["q"].shape[0] == 5 and part.A["v"].shape[0] == 3


@given(st.lists(st.tuples(ANY, st.floats(0.01, 100)), min_size=1, max_size=5))
def test_stack_is_the_weighted_mean_of_products_of_any_ranks(some: list[tuple[LoRA, float]]) -> None:
    loras, weights = [x for x, _ in some], [w for _, w in some]
    assert_close(delta(stack(loras, weights)), dense(loras, weights))


@given(WEIGHTS)
def test_the_residual_is_what_averaging_factors_loses(weights: list[float]) -> None:
    loras = [factors(i) for i in range(len(weights))]
    rest, mean = residual(loras, weights), average(loras, weights)
    assert_close(delta(join(mean, rest)), dense(loras, weights))


@given(st.integers(1, 5), st.integers(1, 4))
def test_the_residual_has_rank_k_minus_one_times_r(clients: int, rank: int) -> None:
    rest = residual([factors(i, rank) for i in range(clients)], [1.0] * clients)
    assert all(a.shape[0] == (clients - 1) * rank for a in rest.A.values())


def test_clients_that_agree_leave_no_residual() -> None:
    same = factors(1)
    assert norm(residual([same, same, same], [1, 2, 3])) < 1e-12 * norm(same)


@given(ANY, st.floats(-3, 3))
def test_scale_scales_the_product(x: LoRA, c: float) -> None:
    assert_close(delta(scale(x, c)), {m: c * d for m, d in written_out(x).items()})


@settings(max_examples=20)
@given(ANY, st.integers(1, 6))
def test_truncate_loses_what_eckart_and_young_say(x: LoRA, rank: int) -> None:
    for m, d in written_out(x).items():
        lost = (d - delta(truncate(x, rank))[m]).norm()
        assert lost == pytest.approx(float(torch.linalg.svdvals(d)[rank:].norm()), abs=1e-9)


def test_truncations_are_nested() -> None:
    lora = factors(4, rank=6)
    assert_close(truncate(truncate(lora, 4), 2).B["q"].abs(), truncate(lora, 2).B["q"].abs())


@given(ANY)
def test_principal_has_orthonormal_rows_and_falling_orthogonal_columns(x: LoRA) -> None:
    p = principal(x, 4)
    for m, a in p.A.items():
        assert_close(a @ a.T, torch.eye(len(a), dtype=a.dtype))
        squares = p.B[m].T @ p.B[m]
        assert_close(squares, torch.diag(squares.diag()), atol=1e-9, rtol=0)
        assert bool((squares.diag().diff() <= 1e-12).all())
        assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all())


@given(ANY, st.integers(1, 5))
def test_the_first_rows_of_principal_are_the_best_of_their_rank(x: LoRA, rank: int) -> None:
    assert_close(delta(leading(principal(x, 5), rank)), delta(truncate(x, rank)))


def test_principal_does_not_depend_on_the_signs_it_is_given() -> None:
    x = factors(1)
    flipped = LoRA({m: -a for m, a in x.A.items()}, {m: -b for m, b in x.B.items()})
    assert_close(principal(x, 3).A, principal(flipped, 3).A)


@given(st.integers(0, 9), st.integers(1, 5))
def test_orthonormal_keeps_the_product_and_the_rows_span(seed: int, rank: int) -> None:
    x = factors(seed, rank)
    y = orthonormal(x)
    assert_close(delta(y), delta(x))
    assert y.H is x.H
    for m, a in y.A.items():
        assert_close(a @ a.T, torch.eye(rank, dtype=a.dtype))
        assert_close(x.A[m] @ a.T @ a, x.A[m])


@given(st.integers(0, 9), st.integers(1, 4))
def test_leading_is_the_product_of_the_first_rows_and_columns(seed: int, rank: int) -> None:
    x = factors(seed, 4)
    got = leading(x, rank)
    assert_close(delta(got), {m: x.B[m][:, :rank] @ x.A[m][:rank] for m in x.A})
    assert got.H is x.H


@given(st.text(max_size=8), st.integers(1, 5))
def test_reinitialise_is_peft_s_start_and_the_same_for_the_same_seed(seed: str, rank: int) -> None:
    x = factors(1, rank)
    once, again, other = reinitialise(x, seed), reinitialise(x, seed), reinitialise(x, seed + "!")
    for m, a in once.A.items():
        assert torch.equal(a, again.A[m]) and not torch.equal(a, other.A[m])
        assert a.shape == x.A[m].shape and bool((a.abs() <= a.shape[1] ** -0.5).all())
        assert not once.B[m].any() and once.B[m].shape == x.B[m].shape
    assert once.H is x.H
    assert not torch.equal(once.A["q"], once.A["v"])  # of one shape, and still drawn apart


def test_reinitialise_has_the_variance_of_a_uniform_draw() -> None:
    a = reinitialise(LoRA({"q": torch.zeros(64, 400)}, {"q": torch.zeros(10, 64)}), "x").A["q"]
    assert float(a.var()) == pytest.approx(1 / 3 / 400, rel=0.03)


@given(st.lists(ANY, min_size=1, max_size=6))
def test_densified_parts_add_up_to_the_same(some: list[LoRA]) -> None:
    parts = densify([x.only("ABRD") for x in some])
    want = total(some, [1.0] * len(some))
    assert_close({m: torch.stack([delta(p)[m] for p in parts]).sum(0) for m in want}, want)


def test_parts_stay_what_they_are_until_a_dense_one_is_smaller() -> None:
    parts = [factors(i, 1).only("AB") for i in range(6)]  # 39 numbers each; the three matrices have 126
    assert all(kept is part for kept, part in zip(densify(parts[:3]), parts, strict=False))
    (whole,) = densify(parts[:4])
    assert not whole.A and {m: tuple(d.shape) for m, d in whole.D.items()} == SHAPES


def test_a_dense_part_is_not_counted_against_the_factors_that_came_after() -> None:
    (whole,) = densify([factors(i, 1).only("AB") for i in range(4)])
    kept = densify((whole, factors(5, 1).only("AB"), LoRA()))
    assert len(kept) == 2 and kept[0] is whole


@given(ANY)
def test_compact_caps_the_rank_and_keeps_the_product(x: LoRA) -> None:
    big = join(x, factors(11, 4), factors(12, 4))  # dimensions of 5 to 8
    small = compact(big.over(x.only("H")))
    assert {m: a.shape[0] for m, a in small.A.items()} == {"q": 6, "v": 5, "out": 6}
    assert small.H is not None and set(small.H) == set(x.H)
    assert_close(delta(small), delta(big))


def test_compact_leaves_low_ranks_alone() -> None:
    lora = factors(1, 3)
    assert compact(lora).A["q"] is lora.A["q"]


@given(ANY)
def test_norm_is_that_of_the_dense_products(x: LoRA) -> None:
    assert norm(x) == pytest.approx(sum(float(d.square().sum()) for d in written_out(x).values()) ** 0.5)


@given(ANY, ANY)
def test_inner_is_the_frobenius_product_of_the_deltas(x: LoRA, y: LoRA) -> None:
    dx, dy = written_out(x), written_out(y)
    assert inner(x, y) == pytest.approx(sum(float((dx[m] * dy[m]).sum()) for m in dx), abs=1e-9)


def test_inner_counts_only_the_modules_that_both_have() -> None:
    x, y = factors(1), factors(2)
    some = LoRA({"q": y.A["q"]}, {"q": y.B["q"]})
    assert inner(x, some) == pytest.approx(float((delta(x)["q"] * delta(y)["q"]).sum()))


@given(WEIGHTS)
def test_average_is_the_weighted_mean_and_leaves_its_arguments_alone(weights: list[float]) -> None:
    loras = [factors(i) for i in range(len(weights))]
    mean = average(loras, weights)
    for s in "ABH":
        for m, t in mean.side(s).items():
            terms = [w * x.side(s)[m] for w, x in zip(weights, loras, strict=True)]
            assert_close(t, torch.stack(terms).sum(0) / sum(weights))
    assert_close(loras[0].A, factors(0).A, rtol=0, atol=0)


def test_a_side_that_is_not_there_stays_away() -> None:
    only = factors(1).only("B")
    assert not only.A and not only.H and only.over(factors(2)).A["q"] is not None
    assert not average([only], [1.0]).A


def test_an_adapter_is_its_matrices_in_order() -> None:
    lora = sided(1, 3, "RD")
    found = list(lora.matrices())
    assert [side for side, _, _ in found] == sorted((side for side, _, _ in found), key="ABRDH".index)
    assert vars(from_matrices(found)) == vars(lora)
    assert lora.numel() == sum(t.numel() for _, _, t in found)


@given(st.integers(0, 9), st.floats(-3, 3))
def test_a_function_is_applied_to_every_matrix_and_its_counterparts(seed: int, c: float) -> None:
    x, y = sided(seed, 2, "RD"), sided(seed + 1, 2, "RD")
    got = map_factors(lambda a, b: a + c * b, x, y)
    for side, module, t in got.matrices():
        assert torch.equal(t, x.side(side)[module] + c * y.side(side)[module])
    assert {(s, m) for s, m, _ in got.matrices()} == {(s, m) for s, m, _ in x.matrices()}


def test_a_matrix_without_a_counterpart_is_an_error() -> None:
    with pytest.raises(KeyError):
        map_factors(torch.add, factors(1), LoRA(factors(2).A))


def test_the_norm_of_a_difference_is_that_of_all_numbers() -> None:
    x, y = sided(3, 2, "D"), sided(4, 2, "D")
    numbers = torch.cat([(t - y.side(s)[m]).flatten() for s, m, t in x.matrices()])
    assert euclidean_norm(difference(x, y)) == pytest.approx(float(numbers.norm()))
    assert euclidean_norm(difference(x, x)) == 0.0


def test_a_difference_of_small_changes_in_low_precision_is_exact() -> None:
    x = LoRA({"q": torch.tensor([[1.0, 1.0078125]]).bfloat16()})
    assert difference(x, LoRA({"q": torch.ones(1, 2)})).A["q"].tolist() == [[0.0, 0.0078125]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("settle", "densify"),
        ("contrast", "residual"),
        ("redraw", "reinitialise"),
        ("shares", "normalised"),
        ("wide", "at_least_float32"),
    ],
)
def test_strategies_of_others_find_the_old_names(old: str, new: str) -> None:
    assert getattr(algebra, old) is getattr(algebra, new)
