"""The strategies that work on products: their invariants, and what makes one equal another."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, average, delta, join, norm, normalised, scale, stack, truncate_by_energy
from fedlora.strategies.fedex_lora import FedEx
from fedlora.strategies.fedsa_lora import FedSALoRA
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.flexlora import FlexLoRA
from fedlora.strategies.flora import FLoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.hetlora import HetLoRA, padded
from fedlora.strategy import Client, Job, Strategy, load
from tests.support.adapters import SHAPES, factors, fresh

CLIENT = Client(id=0, examples=1, rank=4)
Ranked = list[tuple[int, float]]  # a client's rank and its weight
Any_ = Strategy[Any]
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)
RANKED = st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 10)), min_size=1, max_size=4)
near = partial(assert_close, rtol=1e-10, atol=1e-10)
same = partial(assert_close, rtol=0, atol=0)


def local(job: Job, seed: int, steps: int = 3, lr: float = 0.01, clip: float = torch.inf) -> LoRA:
    """Gradient descent of all that the job trains towards this client's own dense target and head."""
    target, base = factors(seed, 6), delta(join(*job.offset))
    x = {s: {m: t.clone().requires_grad_(s in job.trains) for m, t in job.start.side(s).items()} for s in "ABH"}
    trained = [t for s in job.trains for t in x[s].values()]
    for _ in range(steps):
        missed = [x["B"][m] @ x["A"][m] + base.get(m, 0) - t for m, t in delta(target).items()]
        missed += [h - target.H[m] for m, h in x["H"].items()]
        grads = torch.autograd.grad(torch.stack([e.square().sum() / 2 for e in missed]).sum(), trained)
        factor = lr * min(1.0, clip / float(torch.stack([g.norm() for g in grads]).norm()))
        for t, g in zip(trained, grads, strict=True):
            t.data -= factor * g
    return LoRA(**{s: {m: t.detach() for m, t in side.items()} for s, side in x.items()})


def play(strategy: Any_, lora: LoRA, clients: Ranked, rounds: int = 3, **how: Any) -> tuple[Any, list[LoRA]]:
    """The state after some rounds of clients with a target of their own each, and what each keeps for the next."""
    state, kept, weights = strategy.init(lora), [LoRA()] * len(clients), [w for _, w in clients]
    for _ in range(rounds):
        jobs = [strategy.client_init(state, Client(i, 1, r)) for i, (r, _) in enumerate(clients)]
        jobs = [replace(job, start=own.over(job.start)) for job, own in zip(jobs, kept, strict=True)]
        trained = [local(job, i, **how) for i, job in enumerate(jobs)]
        kept = [x.only("".join(set(j.trains) - set(j.shares))) for x, j in zip(trained, jobs, strict=True)]
        state = strategy.aggregate(state, [x.only(j.shares) for x, j in zip(trained, jobs, strict=True)], weights)
    return state, kept


def once(strategy: Any_, updates: Sequence[LoRA], weights: Sequence[float], rank: int = 4) -> Any:
    return strategy.aggregate(strategy.init(fresh(rank)), updates, weights)


def mean(loras: Sequence[LoRA], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the products, dense."""
    p, products = normalised(weights), [delta(x) for x in loras]
    return {m: torch.stack([c * x[m] for c, x in zip(p, products, strict=True)]).sum(0) for m in products[0]}


def model(strategy: Any_, state: Any) -> dict[str, Tensor]:
    return dict(delta(strategy.adapter(state)))


def check_exact(strategy: Any_, clients: Ranked, start: LoRA) -> None:
    """The new model is the weighted mean of the clients' models, round after round."""
    state, weights = strategy.init(start), [w for _, w in clients]
    near(model(strategy, state), dict(delta(start)))
    for t in range(3):
        jobs = [strategy.client_init(state, Client(i, 1, r)) for i, (r, _) in enumerate(clients)]
        moved = [factors(10 * t + i, clients[i][0]).only(j.trains).over(j.start) for i, j in enumerate(jobs)]
        ideal = mean([join(*j.offset, x) for j, x in zip(jobs, moved, strict=True)], weights)
        state = strategy.aggregate(state, [x.only(j.shares) for x, j in zip(moved, jobs, strict=True)], weights)
        near(model(strategy, state), ideal)


@given(WEIGHTS, st.integers(1, 6), st.sampled_from([fresh, partial(factors, 5)]))
def test_ffa_and_fedex_are_exact_at_any_rank_weights_and_start(weights: list[float], rank: int, start: Any) -> None:
    for strategy in (FFALoRA(), FFALoRA(orthonormal=True), FedEx()):
        check_exact(strategy, [(rank, w) for w in weights], start(rank))


@given(RANKED, st.sampled_from([fresh, partial(factors, 5)]))
def test_flora_and_its_like_are_exact_with_mixed_ranks(clients: Ranked, start: Any) -> None:
    for strategy in (FLoRA(), FedEx(assignment="reinit"), FLoRIST(energy=1)):
        check_exact(strategy, clients, start(6))


@pytest.mark.parametrize("name", ["ffa_lora", "fedsa_lora", "fedex_lora", "flora", "florist", "flexlora", "hetlora"])
def test_no_dense_matrix_is_built(name: str) -> None:
    d_out, d_in, strategy = 300_000, 200_000, load(name)  # a product would be 240 GB
    draw = [LoRA({"q": torch.rand(2, d_in)}, {"q": torch.rand(d_out, 2)}) for _ in range(3)]
    state = strategy.init(draw[0])
    job = strategy.client_init(state, Client(0, 1, 2))
    after = strategy.aggregate(state, [x.only(job.shares) for x in draw[1:]], [1.0, 2.0])
    assert strategy.adapter(after).A["q"].shape[1] == d_in


def test_options_without_a_meaning_are_refused() -> None:
    for rank, assignment in ((2, "reinit"), (2, "keep"), (-1, "average")):
        with pytest.raises(StrategyError, match=f"rank = {rank} with assignment = {assignment}"):
            load("fedex_lora", rank=rank, assignment=assignment)
    for energy in (0.0, 1.5):
        with pytest.raises(StrategyError, match=f"energy = {energy:g}"):
            load("florist", energy=energy)


def test_orthonormal_rows_span_what_they_spanned_and_keep_the_product() -> None:
    lora, made = factors(3), FFALoRA(orthonormal=True).init(factors(3))
    assert_close(dict(delta(made)), dict(delta(lora)))
    for m, a in lora.A.items():
        assert_close(made.A[m] @ made.A[m].T, torch.eye(4, dtype=a.dtype))
        assert_close(made.A[m].T @ made.A[m], torch.linalg.pinv(a) @ a)
    assert "vera" in FFALoRA().kinds and "vera" not in FFALoRA(orthonormal=True).kinds  # whose side A is a vector


@pytest.mark.parametrize("clip", [torch.inf, 1.0])
def test_orthonormal_rows_stand_for_a_learning_rate_and_a_clip(clip: float) -> None:
    """SGD from A = Q/sqrt(3), rate 3 lr and clip C is SGD from A = Q, rate lr and clip sqrt(3) C."""
    Q = FFALoRA(orthonormal=True).init(fresh())
    small, clients = LoRA({m: a / 3**0.5 for m, a in Q.A.items()}, Q.B), [(4, 1.0), (4, 2.0)]
    plain, _ = play(FFALoRA(), small, clients, lr=0.03, clip=clip)
    other, _ = play(FFALoRA(orthonormal=True), small, clients, lr=0.01, clip=3**0.5 * clip)
    near(dict(delta(plain)), dict(delta(other)))
    same((plain.A, other.A), (small.A, FFALoRA(orthonormal=True).init(small).A))


def test_fedsa_with_one_client_is_local_training() -> None:
    state, (kept,) = play(FedSALoRA(), fresh(), [(4, 1.0)], rounds=4)
    alone = local(Job(start=fresh()), 0, steps=12)
    near((state.A, kept.B, kept.H), (alone.A, alone.B, alone.H))


def test_fedsa_shares_a_and_nothing_else() -> None:
    state, kept = play(FedSALoRA(), fresh(), [(4, 1.0), (4, 2.0)])
    same((state.B, state.H), (fresh().B, fresh().H))
    assert all(not torch.allclose(kept[0].B[m], b) for m, b in kept[1].B.items())


@pytest.mark.parametrize("side", ["A", "B"])
def test_there_is_no_residual_where_a_factor_is_the_same_for_all(side: str) -> None:
    updates, weights = [factors(i) for i in (2, 3, 4)], [1.0, 2.0, 3.0]
    alike = [factors(1).only(side).over(u) for u in updates]
    assert sum(norm(p) for p in once(FedEx(), alike, weights).parts) < 1e-12
    assert once(FedEx(), updates[:1], [2.0]).parts == ()
    assert norm(once(FedEx(), updates, weights).parts[0]) > 1  # after the first round already


@given(st.integers(1, 8))
def test_a_cut_residual_loses_what_eckart_and_young_say(rank: int) -> None:
    updates, weights, cut = [factors(i, 2) for i in (1, 2, 3)], [1.0, 2.0, 3.0], FedEx(rank=rank)
    whole, less = once(FedEx(), updates, weights, 2), once(cut, updates, weights, 2)
    for m, R in delta(whole.parts[0]).items():
        assert torch.linalg.matrix_rank(delta(less.parts[0])[m]) <= rank
        assert_close((model(FedEx(), whole)[m] - model(cut, less)[m]).norm(), torch.linalg.svdvals(R)[rank:].norm())


def resume(job: Job, own: LoRA, seed: int) -> tuple[LoRA, LoRA]:
    """What a client that goes on from its own factors sends, and its new factors: trained over an offset less these."""
    start = own.over(job.start)
    minus = scale(start.only("AB"), -1)
    new = local(replace(job, start=start, offset=(*job.offset, minus)), seed)
    return join(new, minus).over(new.only("H")), new.only("AB")


@pytest.mark.parametrize("start", [fresh(), factors(5)], ids=["zero", "with a product"])
def test_clients_that_keep_their_factors_stay_exact_whoever_takes_part(start: LoRA) -> None:
    strategy, own = FedEx(assignment="keep"), {i: LoRA() for i in range(3)}
    state = strategy.init(start)
    near(model(strategy, state), dict(delta(start)))
    for cohort in ([0, 1, 2], [0, 2], [1], [0, 1, 2]):
        jobs = {i: strategy.client_init(state, Client(i, 1, i + 2)) for i in cohort}
        before, weights = model(strategy, state), [i + 1.0 for i in cohort]
        sent = {i: resume(job, own[i], i) for i, job in jobs.items()}
        own |= {i: new for i, (_, new) in sent.items()}
        state = strategy.aggregate(state, [sent[i][0] for i in cohort], weights)
        step = mean([sent[i][0] for i in cohort], weights)
        assert all(job.resumes and job.start.A["q"].shape[0] == min(i + 2, 4) for i, job in jobs.items())
        near(model(strategy, state), {m: d + step[m] for m, d in before.items()})


def test_the_papers_keep_taken_at_its_word_is_exact_in_the_first_round_only() -> None:
    """Its own mean is sum_i p_i (W_i + B_i A_i); each client then computes with W_i + B_i A_i, of the new W_i."""
    strategy, weights, own = FedEx(assignment="keep"), [1.0, 3.0], [LoRA(), LoRA()]
    state, W = strategy.init(fresh()), [torch.zeros(8, 6).double()] * 2  # W_i less the pretrained weights
    for t in range(3):
        sent = [resume(strategy.client_init(state, CLIENT), mine, i) for i, mine in enumerate(own)]
        own = [new for _, new in sent]
        state = strategy.aggregate(state, [update for update, _ in sent], weights)
        products, ideal = [delta(x)["q"] for x in own], mean(own, weights)["q"]
        near(model(strategy, state)["q"], ideal)
        meant = (W[0] + products[0] + 3 * (W[1] + products[1])) / 4
        W = [w + ideal - product for w, product in zip(W, products, strict=True)]
        off = float((W[0] + products[0] - meant).norm() / meant.norm())
        assert off < 1e-12 if t == 0 else off > 0.1


def test_a_new_start_changes_no_model_and_is_nested_in_rank() -> None:
    (state, _), (later, _) = (play(FLoRA(), fresh(), [(4, 1.0), (2, 2.0)], n) for n in (2, 3))
    job, smaller = (FLoRA().client_init(state, Client(0, 1, r)) for r in (4, 2))
    again = FLoRA().client_init(later, CLIENT)
    assert_close(dict(delta(join(*job.offset, job.start))), model(FLoRA(), state))
    for m, a in job.start.A.items():
        assert not job.start.B[m].any() and torch.equal(smaller.start.A[m], a[:2])
        assert not torch.equal(again.start.A[m], a) and not torch.equal(fresh().A[m], a)


@given(st.floats(0.01, 1), WEIGHTS)
def test_florist_keeps_the_smallest_rank_with_enough_energy(energy: float, weights: list[float]) -> None:
    stacked = stack([factors(i, 2) for i in range(len(weights))], weights)
    part, kept, dropped = truncate_by_energy(stacked, energy)
    S = {m: torch.linalg.svdvals(d).square() for m, d in delta(stacked).items()}
    lost = [(d - delta(part)[m]).square() for m, d in delta(stacked).items()]
    for m, s in S.items():
        p, share = part.A[m].shape[0], s.cumsum(0) / s.sum()
        assert share[p - 1] >= energy - 1e-12 and (p == 1 or share[p - 2] < energy + 1e-12)
    assert dropped == pytest.approx(float(sum(x.sum() for x in lost) / sum(s.sum() for s in S.values())), abs=1e-12)
    assert kept == pytest.approx(sum(a.shape[0] for a in part.A.values()) / len(SHAPES))


@given(RANKED, st.integers(1, 6))
def test_every_flexlora_client_gets_the_best_approximation_at_its_rank(clients: Ranked, rank: int) -> None:
    updates, weights = [factors(i, r) for i, (r, _) in enumerate(clients)], [w for _, w in clients]
    start = FlexLoRA().client_init(once(FlexLoRA(), updates, weights, 6), Client(0, 1, rank)).start
    for m, d in mean(updates, weights).items():
        assert start.A[m].shape[0] == rank
        assert_close((d - delta(start)[m]).norm(), torch.linalg.svdvals(d)[rank:].norm())


def test_flexlora_starts_are_orthonormal_and_what_is_lost_is_told() -> None:
    updates, weights = [factors(i) for i in (1, 2, 3)], [1.0, 2.0, 3.0]
    state, S = once(FlexLoRA(), updates, weights), [torch.linalg.svdvals(d) for d in mean(updates, weights).values()]
    lost = sum(float(s[4:].square().sum()) for s in S) / sum(float(s.square().sum()) for s in S)
    assert FlexLoRA().notes(state)["dropped_energy"] == pytest.approx(lost, rel=1e-9)
    for a in FlexLoRA().client_init(state, CLIENT).start.A.values():
        assert_close(a @ a.T, torch.eye(4, dtype=a.dtype))


def test_a_round_of_small_clients_shrinks_nobody_for_good() -> None:
    updates = [factors(1, 1), factors(2, 1)]
    start = FlexLoRA().client_init(once(FlexLoRA(), updates, [1.0, 2.0]), CLIENT).start
    assert_close(dict(delta(start)), mean(updates, [1.0, 2.0]))
    assert all(torch.equal(a[2:], fresh().A[m][2:]) and not start.B[m][:, 2:].any() for m, a in start.A.items())


@given(WEIGHTS)
def test_hetlora_with_equal_ranks_by_examples_is_fedit(weights: list[float]) -> None:
    updates = [factors(i) for i in range(len(weights))]
    got, want = once(HetLoRA(weighting="examples"), updates, weights).lora, once(load("fedavg"), updates, weights)
    same((got.A, got.B, got.H), (want.A, want.B, want.H))


@given(RANKED)
def test_hetlora_is_the_mean_of_factors_with_zeros(clients: Ranked) -> None:
    updates, weights = [factors(i, r) for i, (r, _) in enumerate(clients)], [w for _, w in clients]
    norms = [sum(float(d.square().sum()) for d in delta(u).values()) ** 0.5 for u in updates]
    for weighting, p in (("examples", normalised(weights)), ("norm", normalised(norms))):
        got = once(load("hetlora", weighting=weighting), updates, weights, 6).lora
        assert_close(got.H, average([u.only("H") for u in updates], weights).H)
        for row in range(6):
            held = [x for x in zip(p, updates, strict=True) if row < x[1].A["q"].shape[0]] or [(1.0, fresh(6))]
            assert_close(got.A["q"][row], torch.stack([c * u.A["q"][row] for c, u in held]).sum(0))
            assert_close(got.B["q"][:, row], torch.stack([c * u.B["q"][:, row] for c, u in held]).sum(0))


def test_by_examples_the_sum_of_padded_factors_is_enough() -> None:
    strategy, updates = HetLoRA(weighting="examples"), [factors(1, 2), factors(2, 3)]
    sides = [padded(u, dict.fromkeys(SHAPES, 3)).over(u) for u in updates]
    one, each = (once(strategy, *of).lora for of in (([average(sides, [1.0, 3.0])], [4.0]), (updates, [1.0, 3.0])))
    assert strategy.sums_only and not HetLoRA().sums_only
    assert_close((one.A, one.B, one.H), (each.A, each.B, each.H))


@pytest.mark.parametrize("clients", [[(4, 1.0), (4, 2.0)], [(4, 1.0), (1, 2.0), (3, 1.0)]])
def test_fedex_that_starts_anew_and_florist_that_cuts_nothing_are_flora(clients: Ranked) -> None:
    want, _ = play(FLoRA(), fresh(), clients)
    for strategy in (FedEx(assignment="reinit"), FLoRIST(energy=1)):
        got, _ = play(strategy, fresh(), clients)
        near(model(strategy, got), model(FLoRA(), want))
        same(strategy.client_init(got, CLIENT).start.A, FLoRA().client_init(want, CLIENT).start.A)


@given(WEIGHTS)
def test_one_round_of_the_same_updates_gives_the_same_model(weights: list[float]) -> None:
    updates = [factors(i) for i in range(len(weights))]
    for strategy in (FedEx(), FedEx(assignment="reinit"), FLoRA(), FLoRIST(energy=1)):
        near(model(strategy, once(strategy, updates, weights)), mean(updates, weights))
    near(model(FlexLoRA(), once(FlexLoRA(), updates, weights, rank=8)), mean(updates, weights))  # 8: of full rank
