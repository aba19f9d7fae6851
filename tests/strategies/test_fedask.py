"""FedASK: what its two sums come to, held against dense matrices in float64, and when that is the clients' mean."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.jobs import Client, shared_part
from fedlora.lora import LoRA, Side, delta, join, normalised
from fedlora.strategies.fedask import FedASK
from fedlora.strategies.fedmomentum import FedMomentum
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.robust import Robust
from fedlora.strategies.server_optimizer import ServerOptimizer
from tests.support.adapters import SHAPES, factors, fresh
from tests.support.bugs import ProjectsObliquely

R, WEIGHTS = 2, [3.0, 1.0, 2.0]
FULL = max(map(max, SHAPES.values()))  # a width that no module's product exceeds in rank
near = partial(assert_close, rtol=1e-10, atol=1e-10)


def play(
    strategy: FedASK, state: Any, trained: Sequence[LoRA], weights: Sequence[float], gone: Collection[int] = ()
) -> Any:
    """The state after a round in which clients trained these; some are gone by the second pass."""
    clients = [Client(i, 1, len(next(iter(x.A.values())))) for i, x in enumerate(trained)]
    for there in (clients, [c for c in clients if c.id not in gone]):
        updates = [shared_part(strategy.client_init(state, c), trained[c.id]) for c in there]
        state = strategy.aggregate(state, updates, [weights[c.id] for c in there])
    return state


def mean(trained: Sequence[LoRA], weights: Sequence[float]) -> Side:
    """The weighted mean of the products, dense."""
    products = [delta(x) for x in trained]
    return {m: sum(p * x[m] for p, x in zip(normalised(weights), products, strict=True)) for m in products[0]}  # type: ignore[misc]


def best(M: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of this rank."""
    u, s, vh = torch.linalg.svd(M, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def seen_through(omega: Side, M: Side) -> Side:
    """The mean as far as a sketch of it spans it: Q Q^T M."""
    Q = {m: torch.linalg.qr(M[m] @ x).Q for m, x in omega.items()}
    return {m: q @ (q.T @ M[m]) for m, q in Q.items()}


def check_oracle(strategy: FedASK, trained: Sequence[LoRA], weights: Sequence[float]) -> None:
    state = strategy.init(fresh(R))
    after = play(strategy, state, trained, weights)
    wanted = seen_through(state.omega, mean(trained, weights))
    near(dict(delta(after.lora)), {m: best(P, R) for m, P in wanted.items()})
    if strategy.rest:
        near(dict(delta(strategy.adapter(after))), wanted)


@given(
    st.lists(st.tuples(st.integers(0, 99), st.floats(0.1, 9)), min_size=1, max_size=4), st.integers(2, 6), st.booleans()
)
def test_two_sums_make_the_projection_of_the_mean_and_its_best_part_the_next_start(
    clients: list[tuple[int, float]], width: int, rest: bool
) -> None:
    check_oracle(FedASK(width=width, rest=rest), [factors(s, R) for s, _ in clients], [w for _, w in clients])


def test_a_q_without_orthonormal_columns_is_another_model() -> None:
    with pytest.raises(AssertionError):
        check_oracle(ProjectsObliquely(), [factors(i, R) for i in range(3)], WEIGHTS)


def test_the_factors_are_balanced() -> None:
    after = play(FedASK(), FedASK().init(fresh(R)), [factors(i, R) for i in range(3)], WEIGHTS)
    for m, a in after.lora.A.items():
        near(a @ a.T, after.lora.B[m].T @ after.lora.B[m])


def test_a_wide_sketch_and_the_rest_are_floras_and_fedmomentums_model_from_sums_alone() -> None:
    """Round after round the mean of the clients' models, for which those need every client's own factors."""
    ask, flora, momentum = FedASK(width=FULL), FLoRA(), FedMomentum()
    state, other = ask.init(fresh(R)), momentum.init(fresh(R))
    for t in range(3):
        trained = [factors(10 * t + i, R) for i in range(3)]
        before = delta(join(*state.parts))
        state = play(ask, state, trained, WEIGHTS)
        wanted = {m: x + before.get(m, 0) for m, x in mean(trained, WEIGHTS).items()}
        near(dict(delta(ask.adapter(state))), wanted)
        other = momentum.aggregate(other, trained, WEIGHTS)
        near(dict(delta(ask.adapter(state))), dict(delta(momentum.adapter(other))))
        near(dict(delta(state.lora)), dict(delta(other.lora)))
        if t == 0:
            stacked = flora.aggregate(flora.init(fresh(R)), trained, WEIGHTS)
            near(dict(delta(flora.adapter(stacked))), wanted)


def test_a_wide_sketch_alone_is_not_exact_and_a_narrow_one_is_a_sketch() -> None:
    """Without the rest it is off by what lies beyond the rank; a sketch narrower than the mean by more than that."""
    trained = [factors(i, R) for i in range(3)]
    M = mean(trained, WEIGHTS)
    cut = FedASK(width=FULL, rest=False)
    after = play(cut, cut.init(fresh(R)), trained, WEIGHTS)
    near(dict(delta(cut.adapter(after))), {m: best(x, R) for m, x in M.items()})
    beyond = sum(float((x - best(x, R)).square().sum()) for x in M.values())
    assert after.dropped == pytest.approx(beyond / sum(float(x.square().sum()) for x in M.values()))
    narrow = FedASK(width=3)
    found = delta(narrow.adapter(play(narrow, narrow.init(fresh(R)), trained, WEIGHTS)))
    assert all(float((found[m] - x).norm()) > 1e-3 for m, x in M.items())


def test_with_a_wide_sketch_the_mean_is_that_of_those_who_answered_both_passes() -> None:
    """Their weights are those of the clients that are left: Q spans more than it takes."""
    ask, trained = FedASK(width=FULL), [factors(i, R) for i in range(3)]
    after = play(ask, ask.init(fresh(R)), trained, WEIGHTS, gone={1})
    near(dict(delta(ask.adapter(after))), dict(mean([trained[0], trained[2]], [3.0, 2.0])))


def test_the_head_is_the_mean_of_all_who_answered_the_first_pass() -> None:
    trained = [factors(i, R) for i in range(3)]
    after = play(FedASK(), FedASK().init(fresh(R)), trained, WEIGHTS, gone={1})
    p = normalised(WEIGHTS)
    near(dict(after.lora.H), {m: sum(c * x.H[m] for c, x in zip(p, trained, strict=True)) for m in trained[0].H})


def test_omega_is_another_in_every_round_and_the_same_for_all_and_whoever_draws_it() -> None:
    ask, trained = FedASK(), [factors(i, R) for i in range(3)]
    state = ask.init(fresh(R))
    after = play(ask, state, trained, WEIGHTS)
    jobs = [ask.client_init(state, Client(i, 1, R)) for i in range(2)]
    assert jobs[0].right["q"] is jobs[1].right["q"]
    assert torch.equal(FedASK().init(fresh(R)).omega["q"], state.omega["q"])
    assert not torch.allclose(after.omega["q"], state.omega["q"])


def test_clients_of_every_rank_send_a_sketch_of_one_width() -> None:
    ask = FedASK()
    state, ranks = ask.init(fresh(4)), (1, 4)
    sent = [shared_part(ask.client_init(state, Client(i, 1, r)), factors(i, r)).B["q"] for i, r in enumerate(ranks)]
    assert [tuple(y.shape) for y in sent] == [(SHAPES["q"][0], 8)] * 2


def test_a_mean_of_low_rank_leaves_no_direction_that_nothing_can_move() -> None:
    """Where B has stayed zero, the first A stands in its rows: with both zero there would be no gradient ever."""
    after = play(FedASK(), FedASK().init(fresh(R)), [fresh(R)] * 3, WEIGHTS)
    assert all(bool(a.norm(dim=1).min() > 0) for a in after.lora.A.values())


def test_no_rule_that_looks_at_one_pass_alone_goes_round_it() -> None:
    with pytest.raises(StrategyError, match="of two passes each would leave out other clients"):
        Robust(FedASK(), "median")
    with pytest.raises(StrategyError, match="FedASK"):
        ServerOptimizer(FedASK(), "adam")
    with pytest.raises(ValueError, match="width = -1"):
        FedASK(width=-1)
