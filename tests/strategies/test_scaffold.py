"""SCAFFOLD against the paper's algorithm in float64, on clients whose losses are quadratic and unlike."""

from collections.abc import Mapping, Sequence
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, map_factors
from fedlora.run.plan import Plan, job_for
from fedlora.sections import MessageConfig
from fedlora.strategies.scaffold import Scaffold, State
from fedlora.strategy import Client, Sender
from tests.support.adapters import factors

K, RATE, ROUNDS = 5, 0.2, 70
WEIGHTS = [1.0, 4.0, 2.0]


def start() -> LoRA:
    return small(0)


def small(seed: int) -> LoRA:
    made = factors(seed)
    return LoRA({"q": made.A["q"]}, {"q": made.B["q"]})


@cache
def bowl(client: int) -> tuple[LoRA, LoRA]:
    """Where a client's loss is least, and how fast it rises in every direction."""
    return small(10 + client), map_factors(lambda t: 0.2 + t.abs(), small(20 + client))


def gradient(client: int, at: LoRA) -> LoRA:
    least, steep = bowl(client)
    return map_factors(lambda x, low, h: h * (x - low), at, least, steep)


def descend(client: int, x: LoRA, correction: LoRA, rate: float = RATE) -> LoRA:
    for _ in range(K):
        x = map_factors(lambda x, g, c: x - rate * (g + c), x, gradient(client, x), correction)
    return x


def played(strategy: Scaffold, state: State, who: Sequence[int], weights: Sequence[float]) -> State:
    """A round of these clients, each with a rate of its own."""
    rates = {i: RATE / (1 + i) for i in who}
    jobs = {i: strategy.client_init(state, Client(i, 1, 4)) for i in who}
    updates = [descend(i, job.start, job.correction, rates[i]) for i, job in jobs.items()]
    return strategy.aggregate(state, updates, weights, [Sender(i, 1, sum_of_rates=K * rates[i]) for i in who])


def vector(lora: LoRA) -> torch.Tensor:
    return torch.cat([t.flatten() for _, _, t in lora.matrices()])


def optimum(weights: Sequence[float]) -> torch.Tensor:
    """Where the clients' weighted losses are least together."""
    pairs = [(w, *map(vector, bowl(i))) for i, w in enumerate(weights)]
    return sum(w * h * low for w, low, h in pairs) / sum(w * h for w, _, h in pairs)  # type: ignore[return-value]


def paper(x: torch.Tensor, rounds: int) -> tuple[torch.Tensor, Mapping[int, torch.Tensor]]:
    """Algorithm 1 with option II, all three clients in every round: the model, and the control variates."""
    bowls = {i: tuple(map(vector, bowl(i))) for i in range(3)}
    c, own = torch.zeros_like(x), {i: torch.zeros_like(x) for i in range(3)}
    for _ in range(rounds):
        after = {}
        for i, (low, h) in bowls.items():
            y = x
            for _ in range(K):
                y = y - RATE * (h * (y - low) - own[i] + c)
            after[i] = y
        own, before = {i: own[i] - c + (x - y) / (K * RATE) for i, y in after.items()}, own
        x = x + sum(y - x for y in after.values()) / 3
        c = c + sum(own[i] - before[i] for i in own) / 3
    return x, own


def test_with_all_clients_and_equal_weights_it_is_the_papers_algorithm() -> None:
    strategy = Scaffold()
    state = strategy.init(start())
    for _ in range(4):
        jobs = [strategy.client_init(state, Client(i, 1, 4)) for i in range(3)]
        updates = [descend(i, job.start, job.correction) for i, job in enumerate(jobs)]
        senders = [Sender(i, 1, sum_of_rates=K * RATE) for i in range(3)]
        state = strategy.aggregate(state, updates, [1.0] * 3, senders)
    x, own = paper(vector(start()), 4)
    assert_close(vector(state.lora), x, rtol=1e-10, atol=1e-10)
    for i, c in own.items():
        assert_close(vector(state.own[i]), c, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cohorts", [[(0, 1, 2)], [(0, 1), (1, 2), (2, 0)]], ids=["all clients", "two of three"])
def test_it_ends_where_the_weighted_losses_are_least_though_clients_drift(cohorts: list[tuple[int, ...]]) -> None:
    strategy = Scaffold()
    state = strategy.init(start())
    for t in range(ROUNDS):
        who = cohorts[t % len(cohorts)]
        state = played(strategy, state, who, [WEIGHTS[i] for i in who])
    left = float((vector(state.lora) - optimum(WEIGHTS)).norm() / optimum(WEIGHTS).norm())
    assert left < 1e-6


def test_without_corrections_the_same_clients_end_elsewhere() -> None:
    x = start()
    nothing = map_factors(torch.zeros_like, x)
    for _ in range(ROUNDS):
        updates = [descend(i, x, nothing, RATE / (1 + i)) for i in range(3)]
        x = map_factors(lambda *t: sum(w * u for w, u in zip(WEIGHTS, t, strict=True)) / sum(WEIGHTS), *updates)
    assert float((vector(x) - optimum(WEIGHTS)).norm() / optimum(WEIGHTS).norm()) > 0.05


def test_a_client_that_was_never_asked_is_not_corrected() -> None:
    strategy = Scaffold()
    state = played(strategy, strategy.init(start()), (0, 1), [1.0, 1.0])
    assert not vector(strategy.client_init(state, Client(7, 1, 4)).correction).any()
    assert vector(strategy.client_init(state, Client(0, 1, 4)).correction).any()


def test_corrections_of_all_clients_cancel_in_the_mean() -> None:
    strategy = Scaffold()
    state = played(strategy, strategy.init(start()), (0, 1, 2), WEIGHTS)
    corrections = [vector(strategy.client_init(state, Client(i, 1, 4)).correction) for i in range(3)]
    total = sum(w * c for w, c in zip(WEIGHTS, corrections, strict=True))
    assert_close(total, torch.zeros_like(corrections[0]), rtol=0, atol=1e-10)


def test_a_run_that_rounds_what_clients_start_from_is_refused() -> None:
    """The rounding, over a sum of small learning rates, would count as a gradient."""
    plan = Plan(rounds=1, cohort=1, messages=MessageConfig(down="bfloat16"))
    with pytest.raises(StrategyError, match=r"Scaffold reads each client's gradients .* leave messages.down out"):
        job_for(Scaffold(), Scaffold().init(start()), Client(0, 1, 4), plan, 0)
