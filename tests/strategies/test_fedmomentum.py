"""FedMomentum: what is trained on is the best of its rank, and nothing of the mean is lost unless it was asked for."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, delta, join, leading, scale
from fedlora.strategies.capped import Capped
from fedlora.strategies.fedex_lora import FedEx
from fedlora.strategies.fedmomentum import FedMomentum
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategy import Client, load
from tests.strategies.test_products import Ranked, check_exact, mean, near, once, play
from tests.support.adapters import SHAPES, factors, fresh

WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)
RANKED = st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 10)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(RANKED, st.sampled_from([fresh, partial(factors, 5)]))
def test_it_is_exact_with_mixed_ranks_at_any_weights_and_start(clients: Ranked, start: partial[LoRA]) -> None:
    check_exact(FedMomentum(), clients, start(6))


@settings(max_examples=50)
@given(WEIGHTS, st.integers(1, 5), st.floats(0.05, 0.999))
def test_the_adapter_is_the_best_of_its_rank_and_the_rest_the_fewest_directions_that_hold_the_energy(
    weights: list[float], rank: int, energy: float
) -> None:
    updates = [factors(i, rank) for i in range(len(weights))]
    state = once(FedMomentum(energy=energy), updates, weights, rank)
    model = delta(FedMomentum().adapter(state))
    for m, dense in mean(updates, weights).items():
        S = torch.linalg.svdvals(dense)
        share = S.square().cumsum(0) / S.square().sum()
        q = max(rank, int((share < energy - 1e-12).sum()) + 1)
        assert_close((dense - delta(state.lora)[m]).norm(), S[rank:].norm())
        assert_close((dense - model[m]).norm(), S[q:].norm(), atol=1e-9, rtol=1e-9)


def test_each_factor_takes_the_root_of_the_singular_values() -> None:
    state = once(FedMomentum(), [factors(1), factors(2)], [1.0, 3.0])
    for m, a in state.lora.A.items():
        S = torch.linalg.svdvals(mean([factors(1), factors(2)], [1.0, 3.0])[m])[:4]
        near((a @ a.T, state.lora.B[m].T @ state.lora.B[m]), (torch.diag(S), torch.diag(S)))


@given(WEIGHTS)
def test_from_equal_uploads_its_model_is_fedexs(weights: list[float]) -> None:
    updates = [factors(i) for i in range(len(weights))]
    got, want = once(FedMomentum(), updates, weights), once(FedEx(), updates, weights)
    near(dict(delta(FedMomentum().adapter(got))), dict(delta(FedEx().adapter(want))))
    left = [sum(float(d.square().sum()) for d in delta(join(*s.parts)).values()) for s in (got, want)]
    assert left[0] <= left[1] + 1e-9  # no other rest is smaller


def test_where_the_energy_is_in_the_first_direction_the_adapter_is_flexloras() -> None:
    updates = [factors(1), factors(2), factors(3)]
    got, want = once(FedMomentum(energy=1e-6), updates, [1.0, 2.0, 3.0]), once(FlexLoRA(), updates, [1.0, 2.0, 3.0])
    near((dict(delta(got.lora)), got.parts), (dict(delta(want.lora)), ()))
    assert {a.shape[0] for a in got.lora.A.values()} == {4}  # not the rank that holds the energy
    notes = FedMomentum().notes(got)
    assert notes["kept_rank"] == 4 and notes["dropped_energy"] == pytest.approx(
        FlexLoRA().notes(want)["dropped_energy"]
    )


def test_a_client_that_turns_its_factors_changes_nothing() -> None:
    updates, Q = [factors(1), factors(2)], torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    turned = LoRA({m: Q @ a for m, a in updates[0].A.items()}, {m: b @ Q.T for m, b in updates[0].B.items()})
    got, want = (once(FedMomentum(), [u, updates[1]], [1.0, 2.0]) for u in (turned.over(updates[0]), updates[0]))
    near(dict(delta(got.lora)), dict(delta(want.lora)))


def test_a_mean_of_low_rank_is_filled_with_rows_of_the_first_a() -> None:
    state = once(FedMomentum(), [factors(1, 1)], [1.0])
    near(dict(delta(state.lora)), dict(delta(factors(1, 1))))
    assert all(torch.equal(a[1:], fresh().A[m][1:]) for m, a in state.lora.A.items()) and not state.parts


def test_a_client_of_low_rank_has_in_its_offset_what_it_does_not_train() -> None:
    state, _ = play(FedMomentum(), fresh(), [(4, 1.0), (2, 2.0), (1, 3.0)])
    for rank in (1, 3, 4):
        job = FedMomentum().client_init(state, Client(0, 1, rank))
        assert {a.shape[0] for a in job.start.A.values()} == {rank} and len(job.offset) == len(state.parts) + (rank < 4)
        near(dict(delta(join(*job.offset, job.start))), dict(delta(FedMomentum().adapter(state))))


def test_under_a_cap_a_client_of_low_rank_has_the_best_of_that_rank_of_all_that_it_lacks() -> None:
    capped = Capped(FedMomentum(), 2)
    state, _ = play(capped, fresh(), [(4, 1.0), (2, 2.0)])
    (part,) = capped.client_init(state, Client(0, 1, 1)).offset
    lora = state.inner.lora
    lacking = join(state.part, lora, scale(leading(lora, 1).only("AB"), -1))
    for m, d in delta(lacking).items():
        assert part.A[m].shape[0] == 2
        assert_close((d - delta(part)[m]).norm(), torch.linalg.svdvals(d)[2:].norm())


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(energy: float) -> None:
    with pytest.raises(StrategyError, match=f"energy = {energy:g}"):
        load("fedmomentum", energy=energy)


def test_no_dense_matrix_is_built() -> None:
    d_out, d_in = 300_000, 200_000  # a product would be 240 GB
    draw = [LoRA({"q": torch.rand(2, d_in)}, {"q": torch.rand(d_out, 2)}) for _ in range(3)]
    after = FedMomentum().aggregate(FedMomentum().init(draw[0]), draw[1:], [1.0, 2.0])
    assert FedMomentum().adapter(after).A["q"].shape[1] == d_in and SHAPES
