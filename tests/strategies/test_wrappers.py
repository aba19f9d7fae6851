"""What goes round a strategy: a server optimiser, robust aggregation, an anchored start, a capped offset."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora import SIDES, LoRA, average, delta, join, residual, stack
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.capped import Capped
from fedlora.strategies.head import Head
from fedlora.strategies.robust import Robust
from fedlora.strategies.server_optimizer import ServerOptimizer
from fedlora.strategy import Client, Job, Strategy, load
from tests.support.adapters import factors, fresh

CLIENT = Client(id=0, examples=1, rank=4)
WEIGHTS, FIVE = [1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0]
AnyStrategy = Strategy[Any]
WRAPPED: dict[str, Callable[[], AnyStrategy]] = {
    "momentum": lambda: ServerOptimizer(load("fedex_lora"), "momentum", lr=0.5),
    "adam": lambda: ServerOptimizer(load("rolora"), "adam", lr=0.1),
    "median": lambda: Robust(load("fedavg"), "median"),
    "krum": lambda: Robust(load("fedex_lora"), "krum"),
    "norm_bound": lambda: Robust(load("fedex_lora"), "norm_bound", bound=1.0),
    "anchored": lambda: Anchored(load("fedex_lora")),
    "capped": lambda: Capped(load("fedex_lora"), 5),
    "all": lambda: Robust(ServerOptimizer(Head(Capped(Anchored(load("fedex_lora")), 6), "local"), "adam"), "krum"),
}
REFUSED: dict[str, Callable[[], Any]] = {
    r"a server optimiser .* FLoRA, which starts anew .* take fedavg": lambda: ServerOptimizer(load("flora"), "adam"),
    r"HetLoRA .* no common step .* lora.rank": lambda: ServerOptimizer(load("hetlora"), "adam").init(fresh()),
    r"Scaffold, which reads every client's gradients .* leave aggregate.optimizer out": lambda: ServerOptimizer(
        load("scaffold"), "adam"
    ).init(fresh()),
    r"median .* FedEx: .* product of every single client.* take krum": lambda: Robust(load("fedex_lora"), "median"),
    r"trimmed_mean .* FSLoRA: .* no coordinates in common": lambda: Robust(load("fslora"), "trimmed_mean"),
    r"krum .* FLoRA: .* no coordinates in common": lambda: Robust(load("flora"), "krum"),
    r"2 \* 1 \+ 3 = 5 updates .* 4 came": lambda: robust("krum", [factors(s) for s in range(4)], byzantine=1),
    r"bound = 0.0: .* a bound above 0": lambda: robust("norm_bound", [factors(1)]),
    r"an update has another shape": lambda: robust("norm_bound", [factors(1, rank=2)], bound=1.0),
    r"factors of their own": lambda: Robust(load("fedex_lora", assignment="keep"), "norm_bound", bound=1).init(fresh()),
    r"rank 0 holds nothing": lambda: Capped(load("fedex_lora"), 0),
}
SECOND: dict[str, Callable[[Any, Any], Any]] = {
    "momentum": lambda D, v: v,
    "adam": lambda D, v: 0.9 * v + 0.1 * D**2,
    "yogi": lambda D, v: v - 0.1 * D**2 * np.sign(v - D**2),
    "adagrad": lambda D, v: v + D**2,
}


def moved(job: Job, seed: int, far: float = 1.0) -> LoRA:
    """All that a client holds after training at random."""
    torch.manual_seed(seed)
    walk = {s: far * (s in job.trains) for s in SIDES}
    return LoRA(**{s: {m: t + c * torch.randn_like(t) for m, t in job.start.side(s).items()} for s, c in walk.items()})


def play(strategy: AnyStrategy, state: Any, seeds: Sequence[int] = (1, 2, 3)) -> list[LoRA]:
    job = strategy.client_init(state, CLIENT)
    return [moved(job, seed).only(job.shares) for seed in seeds]


def run(strategy: AnyStrategy, start: LoRA, rounds: int = 3) -> Any:
    """The state after some rounds of five clients."""
    state = strategy.init(start)
    for t in range(rounds):
        state = strategy.aggregate(state, play(strategy, state, range(5 * t, 5 * t + 5)), FIVE)
    return state


def model(strategy: AnyStrategy, state: Any) -> dict[str, torch.Tensor]:
    job = strategy.client_init(state, CLIENT)
    return dict(delta(join(*job.offset, job.start)))


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a state, in a fixed order."""
    return list(checkpoint.pack(tree)[0].values())


def same(x: Any, y: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))


def vector(lora: LoRA) -> torch.Tensor:
    return torch.cat([t.flatten() for t in leaves(lora)])


def assert_exact(strategy: AnyStrategy, start: LoRA) -> Any:
    """In three rounds the new model is the weighted mean of the clients'; the state after them."""
    state = strategy.init(start)
    for _ in range(3):
        job = strategy.client_init(state, CLIENT)
        local = [moved(job, s) for s in (1, 2, 3)]
        state = strategy.aggregate(state, [x.only(job.shares) for x in local], WEIGHTS)
        assert_close(model(strategy, state), dict(delta(stack([join(*job.offset, x) for x in local], WEIGHTS))))
    return state


@pytest.fixture(params=WRAPPED)
def wrapped(request: pytest.FixtureRequest) -> AnyStrategy:
    return WRAPPED[request.param]()


def test_order_of_clients_and_scale_of_weights_change_nothing(wrapped: AnyStrategy) -> None:
    state = run(wrapped, factors(0), 1)
    updates = play(wrapped, state, range(20, 25))
    there = wrapped.aggregate(state, updates, FIVE)
    back = wrapped.aggregate(state, updates[::-1], [7 * w for w in FIVE[::-1]])
    assert_close(model(wrapped, there), model(wrapped, back))
    assert_close(wrapped.adapter(there).H, wrapped.adapter(back).H)


def test_arguments_are_left_alone(wrapped: AnyStrategy) -> None:
    state = run(wrapped, factors(0), 2)
    updates = play(wrapped, state, range(20, 25))
    before = copy.deepcopy((state, updates))
    wrapped.aggregate(state, updates, FIVE)
    assert same(before, (state, updates))


def test_a_run_resumed_from_its_checkpoint_goes_on_as_it_would_have(wrapped: AnyStrategy, tmp_path: Path) -> None:
    state = run(wrapped, factors(0), 2)
    checkpoint.save(tmp_path, Checkpoint(2, state, {}))
    back = checkpoint.latest(tmp_path)
    assert back is not None
    updates = play(wrapped, state, range(20, 25))
    assert same(*(wrapped.aggregate(s, updates, FIVE) for s in (state, back.state)))


def test_what_is_delivered_is_what_clients_start_from_with_its_head(wrapped: AnyStrategy) -> None:
    state = run(wrapped, factors(0))
    adapter, job = wrapped.adapter(state), wrapped.client_init(state, CLIENT)
    assert_close((dict(delta(adapter)), adapter.H), (model(wrapped, state), job.start.H))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_meaning_is_refused_with_the_reason(reason: str) -> None:
    with pytest.raises(StrategyError, match=reason):
        REFUSED[reason]()


@pytest.mark.parametrize("name", ["fedavg", "fedex_lora", "ffa_lora", "rolora", "fedsa_lora", "fed_sb"])
def test_momentum_of_nothing_at_full_rate_is_the_strategy_itself(name: str) -> None:
    assert same(run(load(name), fresh()), run(ServerOptimizer(load(name), "momentum", beta1=0.0), fresh()).inner)


@pytest.mark.parametrize("kind", SECOND)
def test_three_rounds_are_those_of_the_paper_and_need_the_mean_alone(kind: Any) -> None:
    strategy = ServerOptimizer(load("fedavg"), kind, lr=0.3, beta1=0.8, beta2=0.9, tau=0.01)
    assert strategy.sums_only and not strategy.exact and not strategy.continues
    state, x = strategy.init(fresh()), fresh().B["q"].numpy()
    m, v, plain = np.zeros_like(x), np.full_like(x, 0.01**2), kind == "momentum"
    for _ in range(3):
        updates = play(strategy, state)
        summed = strategy.aggregate(state, [average(updates, WEIGHTS)], [6.0])
        state = strategy.aggregate(state, updates, WEIGHTS)
        D = sum(w * (u.B["q"].numpy() - x) for w, u in zip(WEIGHTS, updates, strict=True)) / 6
        m, v = 0.8 * m + (1.0 if plain else 0.2) * D, SECOND[kind](D, v)
        x = x + 0.3 * m / (1.0 if plain else np.sqrt(v) + 0.01)
        assert_close(strategy.adapter(state).B["q"].numpy(), x)
        assert_close(leaves(summed), leaves(state))


def test_fedex_under_momentum_keeps_its_residual() -> None:
    strategy, updates = ServerOptimizer(load("fedex_lora"), "momentum", lr=0.3), [factors(s) for s in (1, 2, 3)]
    after = strategy.aggregate(strategy.init(fresh()), updates, WEIGHTS)
    (part,) = strategy.client_init(after, CLIENT).offset
    assert_close(delta(part), delta(residual(updates, WEIGHTS)))


def test_a_side_that_sits_out_a_round_keeps_its_moments() -> None:
    strategy = ServerOptimizer(load("rolora"), "adam", lr=0.1)
    one, two = run(strategy, fresh(), 1), run(strategy, fresh(), 2)
    assert set(one.m.B) and not one.m.A and set(two.m.A)
    assert torch.equal(one.m.B["q"], two.m.B["q"]) and torch.equal(one.v.B["q"], two.v.B["q"])


def test_rows_that_no_sketch_held_do_not_move() -> None:
    strategy = ServerOptimizer(load("fslora"), "adam", lr=0.1)
    state = strategy.init(factors(0))
    job = strategy.client_init(state, Client(3, 1, rank=1))
    update = scatter_rows(job, moved(select_rows(job), 1).only(job.shares))
    after = strategy.adapter(strategy.aggregate(state, [update], [1.0]))
    still = [i for i in range(4) if i not in job.sketch["q"]]
    assert_close(after.A["q"][still], factors(0).A["q"][still])
    assert not torch.allclose(after.A["q"], factors(0).A["q"])


def robust(rule: Any, updates: Sequence[LoRA], **options: Any) -> LoRA:
    """What FedAvg becomes of updates under the rule; the weights are not those of the mean."""
    weights = [1.0 + i for i in range(len(updates))]
    return Robust(load("fedavg"), rule, **options).aggregate(factors(0), updates, weights)


@pytest.mark.parametrize("far", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "norm_bound"])
def test_one_client_that_sends_what_it_likes_moves_the_model_no_further_than_the_others(rule: Any, far: float) -> None:
    updates = [moved(Job(factors(0)), s, far if s == 0 else 1.0) for s in range(5)]
    plain, got = vector(average(updates, FIVE)), vector(robust(rule, updates, trim=0.2, bound=30.0))
    assert not plain.abs().max() < 1e5 and got.abs().max() < 12


@pytest.mark.parametrize(("trim", "n", "k"), [(0.0, 5, 0), (0.1, 5, 1), (0.2, 5, 1), (0.28, 25, 7), (0.49, 4, 1)])
def test_tails_of_every_coordinate_are_left_out_of_an_unweighted_mean(trim: float, n: int, k: int) -> None:
    updates = [factors(s) for s in range(n)]
    for side in "ABH":
        for m, got in robust("trimmed_mean", updates, trim=trim).side(side).items():
            ordered = np.sort(np.stack([u.side(side)[m].numpy() for u in updates]), axis=0)
            assert_close(got.numpy(), ordered[k : n - k].mean(0))


@pytest.mark.parametrize("n", [1, 4, 5])
def test_the_median_is_the_middle_of_every_coordinate(n: int) -> None:
    updates = [factors(s) for s in range(n)]
    assert_close(robust("median", updates).B["v"].numpy(), np.median([u.B["v"].numpy() for u in updates], axis=0))


def test_krum_takes_the_update_that_the_paper_takes_however_far_from_zero_all_lie() -> None:
    for first in range(20):
        updates = [LoRA({m: 1e9 + a for m, a in factors(s).A.items()}) for s in range(first, first + 8)]
        x = np.stack([vector(u).numpy() for u in updates])
        scores = [sum(sorted(((x - x[i]) ** 2).sum(1))[1 : 8 - 2 - 2 + 1]) for i in range(8)]
        assert same(robust("krum", updates, byzantine=2), updates[int(np.argmin(scores))])


def test_multi_krum_is_the_unweighted_mean_of_all_but_the_byzantine() -> None:
    honest = [factors(s) for s in range(4)]
    got = vector(robust("multi_krum", [moved(Job(factors(0)), 9, 50.0), *honest]))
    assert_close(got, vector(average(honest, [1.0] * 4)))


def test_krum_breaks_a_tie_alike_in_any_order() -> None:
    a, b, c = (factors(s) for s in (1, 2, 3))
    picked = [robust("krum", order, byzantine=0) for order in ([a, b, c], [c, b, a], [b, a, c])]
    assert same(picked[0], picked[1]) and same(picked[0], picked[2])


def test_a_step_within_the_bound_is_left_as_it_is_and_a_longer_one_is_cut_to_it() -> None:
    short, long = (moved(Job(factors(0)), 1, far) for far in (0.01, 10.0))
    assert same(robust("norm_bound", [short], bound=2.0), short)
    got, x, u = (vector(lora) for lora in (robust("norm_bound", [long], bound=2.0), factors(0), long))
    assert_close(got - x, 2.0 * (u - x) / (u - x).norm())


@pytest.mark.parametrize("name", ["fedavg", "fedex_lora", "flora", "ffa_lora", "fedsvd", "fed_sb", "flexlora"])
def test_a_start_with_a_product_computes_the_pretrained_model(name: str) -> None:
    strategy = Anchored(load(name))
    state = strategy.init(factors(0))
    zero = {m: torch.zeros_like(d) for m, d in delta(factors(0)).items()}
    assert max(float(d.abs().max()) for d in delta(strategy.client_init(state, CLIENT).start).values()) > 0.1
    assert_close(model(strategy, state), zero)
    assert_close(dict(delta(strategy.adapter(state))), zero)


@pytest.mark.parametrize("name", ["fedex_lora", "flora", "ffa_lora", "rolora", "fed_sb"])
def test_what_is_exact_is_exact_from_a_start_with_a_product(name: str) -> None:
    strategy = Anchored(load(name))
    assert strategy.exact
    assert_exact(strategy, factors(0))


def test_a_start_whose_product_is_zero_needs_no_anchor() -> None:
    strategy = Anchored(load("fedavg"))
    state = strategy.init(fresh())
    assert strategy.client_init(state, CLIENT).offset == ()
    assert torch.equal(strategy.adapter(state).A["q"], fresh().A["q"])


def test_a_cap_that_drops_nothing_is_exact() -> None:
    strategy = Capped(load("fedex_lora"), 8)
    assert strategy.notes(assert_exact(strategy, fresh()))["dropped"] == pytest.approx(0)


def test_a_cap_loses_what_eckart_and_young_say_of_all_rounds_together_and_says_how_much() -> None:
    plain, strategy = load("fedex_lora"), Capped(load("fedex_lora"), 2)
    state, (whole,) = run(strategy, fresh(), 4), plain.client_init(run(plain, fresh(), 4), CLIENT).offset
    (part,) = strategy.client_init(state, CLIENT).offset
    assert whole.D and not part.D and not strategy.exact
    singular = {m: torch.linalg.svdvals(d) for m, d in whole.D.items()}
    for m, d in delta(part).items():
        assert float((d - whole.D[m]).norm()) == pytest.approx(float(singular[m][2:].norm()))
    lost, total = (sum(float(s[i:].square().sum()) for s in singular.values()) for i in (2, 0))
    assert strategy.notes(state) == {"offset_rank": 2, "dropped": pytest.approx(lost / total)}


def test_clients_that_resume_load_the_capped_offset_and_it_is_the_model() -> None:
    strategy, start = Capped(load("fedex_lora", assignment="keep"), 8), factors(0)
    change = join(factors(1), LoRA(start.A, {m: -b for m, b in start.B.items()})).over(start.only("H"))
    state = strategy.aggregate(strategy.init(start), [change], [1.0])
    assert strategy.client_init(state, CLIENT).resumes
    assert_close(dict(delta(strategy.adapter(state))), dict(delta(factors(1))))
