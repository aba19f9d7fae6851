"""raFLoRA: a slot of the rank is averaged over those that hold it, so that high ranks do not die out."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedlora.lora import LoRA, delta, join, leading, normalised, orthonormal, principal
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.hetlora import HetLoRA
from fedlora.strategies.raflora import RaFLoRA, State, over_holders
from fedlora.strategy import Client, Strategy, load
from tests.strategies.test_products import Ranked, near, once
from tests.support.adapters import factors, fresh

RANKED = st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 10)), min_size=1, max_size=5)
RANKS, WEIGHTS = (4, 2, 1, 4, 3), [3.0, 10.0, 1.0, 7.0, 4.0]  # the weights of those that hold slot 0, 1, ...:
HELD = [1.0, 0.96, 0.56, 0.40]
Any_ = Strategy[Any]


def slots(state: LoRA, updates: Sequence[LoRA], weights: Sequence[float], m: str) -> Tensor:
    """The paper's mean of one module, dense and slot by slot; a slot that nobody holds is the state's."""
    total = torch.zeros(state.B[m].shape[0], state.A[m].shape[1], dtype=torch.float64)
    for j in range(state.A[m].shape[0]):
        holders = [(c, u) for c, u in zip(weights, updates, strict=True) if u.A[m].shape[0] > j] or [(1.0, state)]
        q = sum(c for c, _ in holders)
        total += sum(c / q * torch.outer(u.B[m][:, j], u.A[m][j]) for c, u in holders)
    return total


def missed(strategy: Any_, updates: Sequence[LoRA], weights: Sequence[float], rank: int = 6) -> float:
    """How far the new adapter of `q` is from the best of its rank of the paper's mean, relatively."""
    state = strategy.aggregate(strategy.init(factors(9, rank)), updates, weights)
    dense = slots(factors(9, rank), updates, weights, "q")
    U, S, Vt = torch.linalg.svd(dense)
    best = U[:, :rank] * S[:rank] @ Vt[:rank]
    return float((delta(strategy.adapter(state))["q"] - best).norm() / best.norm())


def still(strategy: Any_, rounds: int) -> list[LoRA]:
    """The adapters of some rounds of clients that send back what they were given."""
    state = strategy.init(orthonormal(factors(1)))
    seen = [strategy.adapter(state)]
    for _ in range(rounds):
        sent = [strategy.client_init(state, Client(i, 1, r)).start for i, r in enumerate(RANKS)]
        state = strategy.aggregate(state, sent, WEIGHTS)
        seen.append(strategy.adapter(state))
    return seen


@given(RANKED)
def test_it_is_the_papers_mean_slot_by_slot(clients: Ranked) -> None:
    updates, weights = [factors(i, r) for i, (r, _) in enumerate(clients)], [w for _, w in clients]
    assert missed(RaFLoRA(), updates, weights) < 1e-10


class OverAll(RaFLoRA):
    """Every slot over all clients, as FlexLoRA."""

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        made = FlexLoRA().aggregate(FlexLoRA().init(state.first.over(state.lora)), updates, weights)
        return State(made.lora, state.first, made.dropped)


class OverCounts(RaFLoRA):
    """Every slot over those that hold it, all alike."""

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        return super().aggregate(state, updates, [1.0 for _ in weights])


class DropsAbsentSlots(RaFLoRA):
    """A slot that nobody of the round holds is gone."""

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        held = max(u.A["q"].shape[0] for u in updates)
        lora = LoRA(state.lora.A, {m: torch.cat([b[:, :held], 0 * b[:, held:]], 1) for m, b in state.lora.B.items()})
        return super().aggregate(state._replace(lora=lora.over(state.lora)), updates, weights)


@pytest.mark.parametrize("broken", [OverAll(), OverCounts(), DropsAbsentSlots()], ids=lambda s: type(s).__name__)
def test_what_others_make_of_the_rule_is_far_from_it(broken: RaFLoRA) -> None:
    updates = [factors(1, 4), factors(2, 2), factors(3, 4)]
    assert missed(RaFLoRA(), updates, [1.0, 2.0, 5.0]) < 1e-10 and missed(broken, updates, [1.0, 2.0, 5.0]) > 0.05


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4))
def test_with_equal_ranks_it_is_flexlora(weights: list[float]) -> None:
    updates = [factors(i) for i in range(len(weights))]
    got, want = once(RaFLoRA(), updates, weights), once(FlexLoRA(), updates, weights)
    near(dict(delta(got.lora)), dict(delta(want.lora)))
    assert RaFLoRA().notes(got) == pytest.approx(FlexLoRA().notes(want), abs=1e-12)


def test_clients_that_do_not_move_get_back_what_they_had_where_flexlora_shrinks_every_slot() -> None:
    """FlexLoRA's slot j shrinks by q_j in the first round, and by as much in every later one."""
    ours, flex = still(RaFLoRA(), 3), still(FlexLoRA(), 3)
    for now in ours[1:]:
        near(dict(delta(now)), dict(delta(ours[0])))
    first = principal(flex[0], 4)
    shrunk = still_values(flex[1])
    product = LoRA(first.A, {m: b * torch.tensor(HELD).double() for m, b in flex[0].B.items()})
    assert_close(shrunk, still_values(LoRA(flex[0].A, product.B)))
    assert all(float(after[-1]) < 0.5 * float(before[-1]) for before, after in pairwise(map(still_values, flex)))


def still_values(lora: LoRA) -> Tensor:
    """The four largest singular values of one module."""
    return torch.linalg.svdvals(delta(lora)["q"])[:4]


def test_each_factor_takes_the_root_and_clients_the_leading_directions() -> None:
    state = once(RaFLoRA(), [factors(1), factors(2, 2)], [1.0, 2.0])
    start = RaFLoRA().client_init(state, Client(0, 1, 2)).start
    assert {a.shape[0] for a in start.A.values()} == {2}
    for m, a in state.lora.A.items():
        assert_close(a @ a.T, state.lora.B[m].T @ state.lora.B[m])
        assert_close(delta(start)[m], delta(leading(state.lora, 2))[m])


def test_a_round_of_small_clients_leaves_the_other_slots_as_they_were() -> None:
    start = factors(1, 6)
    after = RaFLoRA().aggregate(RaFLoRA().init(start), [factors(2, 1), factors(3, 2)], [1.0, 2.0])
    kept = LoRA({m: a[2:] for m, a in start.A.items()}, {m: b[:, 2:] for m, b in start.B.items()})
    small = over_holders([factors(2, 1), factors(3, 2)], [1.0, 2.0])
    p = normalised([1.0, 2.0])
    moved = join(*[LoRA({m: c * a for m, a in u.A.items()}, u.B) for c, u in zip(p, small, strict=True)])
    near(dict(delta(after.lora)), dict(delta(join(kept, moved))))
    assert {a.shape[0] for a in after.lora.A.values()} == {6}


@pytest.mark.parametrize("name", ["flexlora", "raflora", "fedmomentum"])
@pytest.mark.parametrize("moved", [0, 2])
def test_a_mean_of_low_rank_leaves_no_direction_that_nothing_can_move(name: str, moved: int) -> None:
    """Of four directions two have moved, or none: the others stand as rows of the first A over a B of zeros."""
    strategy, lora = load(name), fresh()
    sent = LoRA(lora.A, {m: torch.cat([b[:, :moved], 0 * b[:, moved:]], 1) for m, b in factors(1).B.items()}, lora.H)
    start = strategy.client_init(
        strategy.aggregate(strategy.init(lora), [sent, sent], [1.0, 2.0]), Client(0, 1, 4)
    ).start
    near(dict(delta(start)), dict(delta(sent)))
    for m, a in start.A.items():
        assert torch.equal(a[moved:], lora.A[m][moved:]) and not start.B[m][:, moved:].any()


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "florist", "raflora"])
def test_the_collapse_is_told_where_ranks_differ_and_nowhere_else(name: str) -> None:
    mixed, alike = [factors(1, 6), factors(2, 2), factors(3, 4)], [factors(1, 6), factors(2, 6)]
    strategy = load(name)
    state = strategy.aggregate(strategy.init(fresh(6)), mixed, [1.0, 2.0, 3.0])
    share = strategy.notes(state)["energy_in_smallest_rank"]
    made = delta(strategy.adapter(state)).values()
    squares = [torch.linalg.svdvals(d).square() for d in made]
    assert share == pytest.approx(sum(float(s[:2].sum() / s.sum()) for s in squares) / 3) and 0 < share < 1
    again = strategy.aggregate(state, alike, [1.0, 2.0])  # the smallest rank so far counts, not that of the round
    assert 0 < strategy.notes(again)["energy_in_smallest_rank"] < 1
    without = strategy.aggregate(strategy.init(fresh(6)), alike, [1.0, 2.0])
    assert "energy_in_smallest_rank" not in strategy.notes(without)


def test_flexlora_collapses_and_raflora_does_not() -> None:
    def told(strategy: Any_) -> list[float]:
        state, seen = strategy.init(orthonormal(factors(1))), []
        for _ in range(8):
            sent = [strategy.client_init(state, Client(i, 1, r)).start for i, r in enumerate(RANKS)]
            state = strategy.aggregate(state, sent, WEIGHTS)
            seen.append(strategy.notes(state)["energy_in_smallest_rank"])
        return seen

    flex, ours = told(FlexLoRA()), told(RaFLoRA())
    assert all(b > a for a, b in pairwise(flex)) and flex[-1] > flex[0] + 0.1
    assert max(ours) - min(ours) < 1e-9


def test_a_run_of_hetlora_from_before_its_note_goes_on() -> None:
    """Its state was the adapter alone."""
    strategy, updates, weights = HetLoRA(), [factors(1, 6), factors(2, 2)], [1.0, 2.0]
    old: Any = fresh(6)
    got, want = strategy.aggregate(old, updates, weights), strategy.aggregate(strategy.init(old), updates, weights)
    near((got.lora.A, strategy.adapter(old).A), (want.lora.A, fresh(6).A))
    assert strategy.notes(old) == {} and strategy.client_init(old, Client(0, 1, 2)).start.A["q"].shape[0] == 2
    assert FLoRIST().notes(FLoRIST().init(old)).keys() == {"kept_rank", "dropped_energy"}
