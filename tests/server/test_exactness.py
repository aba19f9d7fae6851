"""The exactness meter, against dense matrices."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.lora import LoRA, delta, join, stack
from fedlora.server.exactness import aggregation_error
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex_lora import FedEx
from fedlora.strategy import Client, Job
from tests.support.adapters import factors, fresh

CLIENT = Client(0, 1, 4)
ONE = dict.fromkeys(fresh().A, 1.0)


def trained(strategy: Any, state: Any, seeds: tuple[int, ...]) -> tuple[dict[int, Job], dict[int, tuple[LoRA, float]]]:
    jobs = {i: strategy.client_init(state, CLIENT) for i in seeds}
    return jobs, {i: (factors(i), float(i)) for i in seeds}


def after(strategy: Any, state: Any, seeds: tuple[int, ...], scales: dict[str, float]) -> tuple[float | None, Any]:
    jobs, updates = trained(strategy, state, seeds)
    state = strategy.aggregate(state, [u for u, _ in updates.values()], [w for _, w in updates.values()])
    return aggregation_error(strategy.adapter(state), jobs, updates, scales), state


@given(first=st.integers(1, 50), s=st.floats(0.1, 10))
def test_the_distance_is_that_of_dense_matrices(first: int, s: float) -> None:
    scales = {m: s * (i + 1) for i, m in enumerate(ONE)}
    seeds = (first, first + 1, first + 2)
    got, state = after(FedAvg(), FedAvg().init(fresh()), seeds, scales)
    ideal = delta(stack([factors(i) for i in seeds], [float(i) for i in seeds]))
    have = delta(state)
    missed = math.sqrt(sum(float((scales[m] * (have[m] - ideal[m])).square().sum()) for m in ideal))
    whole = math.sqrt(sum(float((scales[m] * ideal[m]).square().sum()) for m in ideal))
    assert got == pytest.approx(missed / whole, rel=1e-9)


def test_an_exact_strategy_measures_zero_round_after_round() -> None:
    strategy = FedEx()
    state = strategy.init(fresh())
    for t in range(4):
        got, state = after(strategy, state, (3 * t + 1, 3 * t + 2, 3 * t + 3), ONE)
        assert got is not None and got < 1e-9


def test_a_residual_that_is_lost_shows() -> None:
    strategy = FedEx()
    jobs, updates = trained(strategy, strategy.init(fresh()), (1, 2))
    state = strategy.aggregate(strategy.init(fresh()), [u for u, _ in updates.values()], [1.0, 2.0])
    lost = aggregation_error(state.lora, jobs, updates, ONE)
    assert lost is not None and lost > 0.1


def test_where_a_factor_stays_with_its_client_there_is_no_common_model() -> None:
    job = Job(fresh(), shares="A")
    assert aggregation_error(fresh(), {0: job}, {0: (factors(1).only("A"), 1.0)}, ONE) is None


def test_a_head_that_stays_does_not_count() -> None:
    job = Job(fresh(), shares="AB")
    assert aggregation_error(factors(1), {0: job}, {0: (factors(1).only("AB"), 1.0)}, ONE) == pytest.approx(
        0, abs=1e-12
    )


def test_a_client_that_resumes_sends_the_change_of_its_product() -> None:
    job = Job(fresh(), offset=(factors(5),), resumes=True)
    change = factors(6)
    assert aggregation_error(join(factors(5), change), {0: job}, {0: (change, 2.0)}, ONE) == pytest.approx(0, abs=1e-12)
