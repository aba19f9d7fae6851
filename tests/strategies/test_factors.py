"""The strategies that work on factors: what their papers claim, and where two of them do the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam
from torch.testing import assert_close

from fedlora.jobs import kept_part, shared_part, start_with
from fedlora.lora import LoRA, average, delta, orthonormal, residual, split_rank, stack
from fedlora.messages.sketch import scatter_rows, select_rows
from fedlora.strategies.dp_lora import DPLoRA
from fedlora.strategies.dual import Dual
from fedlora.strategies.fed_sb import FedSB
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedrot_lora import FedRot, rotation
from fedlora.strategies.fedsvd import FedSVD
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.la_lora import LALoRA, State
from fedlora.strategies.lora_fair import LoRAFair
from fedlora.strategies.rolora import RoLoRA
from fedlora.strategy import Client, Job, Strategy, load
from tests.support.adapters import SHAPES, factors, fresh

SEEDS, RANKS = st.integers(0, 10**6), st.integers(1, 5)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)
CLIENT = Client(0, 1, 4)


def clients(seed: int, weights: Sequence[float], rank: int = 4) -> list[LoRA]:
    return [factors(seed + i, rank) for i in range(len(weights))]


def train(job: Job, client: int, optimizer: Any = SGD) -> LoRA:
    """A client that fits the product to a matrix of its own, |B R A - T|^2 / 2 in every module."""
    sides = {s: {m: t.clone().requires_grad_(s in job.trains) for m, t in job.start.side(s).items()} for s in "ABRH"}
    opt = optimizer([t for s in job.trains if s != "H" for t in sides[s].values()], lr=0.02)
    target = delta(factors(100 + client, 6))
    for _ in range(5):
        opt.zero_grad()
        product = delta(LoRA(**sides))
        torch.stack([(product[m] - t).square().sum() / 2 for m, t in target.items()]).sum().backward()
        opt.step()
    return LoRA(**{s: {m: t.detach() for m, t in side.items()} for s, side in sides.items()}).only(job.shares)


def run(strategy: Strategy[Any], optimizer: Any = SGD, rewind: bool = False) -> Tensor:
    """The products after each of four rounds of three unequal clients: (4, numbers in all modules)."""
    state, seen = strategy.init(orthonormal(fresh())), []
    for _ in range(4):
        updates = [train(strategy.client_init(state, CLIENT), i, optimizer) for i in range(3)]
        state = strategy.aggregate(state, updates, [1.0, 2.0, 3.0])
        state = state._replace(round=0) if rewind else state
        seen.append(torch.cat([d.flatten() for d in delta(strategy.adapter(state)).values()]))
    return torch.stack(seen)


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def projector(a: Tensor) -> Tensor:
    return torch.linalg.pinv(a) @ a


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)


FEDIT = [FSLoRA(), DPLoRA(), FedRot(soft=0)]
FFA = [FedSVD(), FedSVD(every=2), FedSVD(every=0), DPLoRA("B")]


@pytest.mark.parametrize(("one", "other"), [(s, FedAvg()) for s in FEDIT] + [(s, FFALoRA()) for s in FFA], ids=repr)
def test_under_sgd_it_comes_to_fedit_or_to_ffa_with_an_orthonormal_a(one: Strategy[Any], other: Strategy[Any]) -> None:
    assert apart(run(one), run(other)) < 1e-10


def test_under_adam_fedsvd_does_not() -> None:
    assert apart(run(FedSVD(), Adam), run(FFALoRA(), Adam)) > 1e-3


def test_rolora_with_rounds_of_b_alone_is_ffa() -> None:
    assert apart(run(RoLoRA(), rewind=True), run(FFALoRA())) == 0


@given(SEEDS, RANKS, WEIGHTS)
def test_fedsvd_keeps_the_product_over_orthonormal_rows(seed: int, rank: int, weights: list[float]) -> None:
    before = FedSVD().init(factors(seed + 9, rank))
    updates = [u.only("BH") for u in clients(seed, weights, rank)]
    after, mean = FedSVD().aggregate(before, updates, weights).lora, average(updates, weights).over(before.lora)
    assert_close((dict(delta(after)), after.H), (dict(delta(mean)), mean.H))
    for m, a in after.A.items():
        assert_close(a @ a.T, torch.eye(rank, dtype=a.dtype))
        energy = after.B[m].T @ after.B[m]
        assert_close(energy, energy.diag().sort(descending=True).values.diag(), rtol=0, atol=1e-9 * float(energy.max()))
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("strength", [(1, 1), (1, 1e-4), (1, 1e-8), (1, 0), (0, 0)])
def test_fedsvd_stays_in_the_first_span_however_weak_b_is(strength: tuple[float, float]) -> None:
    start, columns = factors(0, 2, torch.float32), torch.tensor(strength)
    state = FedSVD().init(start)
    for t in range(3):
        update = LoRA(B={m: b * columns for m, b in factors(t, 2, torch.float32).B.items()}, H=start.H)
        state = FedSVD().aggregate(state, [update], [1.0])
        for m, a in state.lora.A.items():
            assert_close(a.T @ a, projector(start.A[m]), rtol=0, atol=1e-5)  # so the rows are orthonormal, too


def test_fedsvd_counts_a_in_the_rounds_that_bring_a_new_one() -> None:
    state = FedSVD(every=2).init(fresh())
    for t in range(1, 5):
        before, state = state, FedSVD(every=2).aggregate(state, [factors(t).only("BH")], [1.0])
        new = state.lora.A["q"] is not before.lora.A["q"]
        assert eval(FedSVD(every=2).down, {"r": 4, "d_in": 6, "d_out": 8, "t": t}) == 4 * (8 + 6 * new)


@given(SEEDS, RANKS)
def test_fair_is_fedit_and_without_penalty_the_residual_in_the_rows_of_a_besides(seed: int, rank: int) -> None:
    updates, weights = clients(seed, [1, 2, 3], rank), [1, 2, 3]
    mean, rest = FedAvg().aggregate(fresh(), updates, weights), delta(residual(updates, weights))
    got = LoRAFair(lam=0).aggregate(fresh(), updates, weights)
    for m, target in delta(stack(updates, weights)).items():
        a = got.A[m]
        assert torch.equal(a, mean.A[m])
        assert_close(delta(got)[m], torch.linalg.lstsq(a.T, target.T).solution.T @ a, rtol=1e-6, atol=1e-7)
        assert_close(delta(got)[m], delta(mean)[m] + rest[m] @ projector(a), rtol=1e-6, atol=1e-7)
    assert_close(LoRAFair(lam=1e14).aggregate(fresh(), updates, weights).B, mean.B)


@given(SEEDS, WEIGHTS, st.floats(0, 1e3))
def test_fair_is_where_the_penalised_distance_is_level(seed: int, weights: list[float], lam: float) -> None:
    updates = clients(seed, weights)
    mean, got = average(updates, weights), LoRAFair(lam=lam).aggregate(fresh(), updates, weights)
    for m, target in delta(stack(updates, weights)).items():
        dB = (got.B[m] - mean.B[m]).requires_grad_()
        ((target - (mean.B[m] + dB) @ mean.A[m]).square().sum() + lam * dB.square().sum()).backward()
        assert dB.grad.abs().max() < 1e-8 * (1 + lam)
        assert (target - delta(got)[m]).norm() <= (target - delta(mean)[m]).norm() + 1e-9


@pytest.mark.parametrize("fair", [LoRAFair(), LoRAFair(lam=0), LoRAFair("cosine")], ids=repr)
def test_fair_corrects_nothing_where_all_a_are_equal_even_if_singular(fair: LoRAFair) -> None:
    A = {m: torch.cat([a[:3], a[:1]]) for m, a in factors(9).A.items()}
    for updates in ([LoRA(A, u.B) for u in clients(0, [1, 2])], [LoRA(A, fresh().B)] * 2):
        assert_close(delta(fair.aggregate(fresh(), updates, [1, 2])), delta(average(updates, [1, 2])))


def dense_descent(fair: LoRAFair, b: Tensor, a: Tensor, target: Tensor) -> Tensor:
    """The cosine form by autograd on matrices (d_out, d_in)."""
    dB, unit = torch.zeros_like(b), float((b @ a).square().sum())
    step = fair.lr / float(torch.linalg.matrix_norm(a, 2)) ** 2
    for _ in range(fair.steps):
        x = dB.clone().requires_grad_()
        (1 - cosine(target, (b + x) @ a)).backward()
        dB = (dB - step * unit * x.grad) / (1 + 2 * step * fair.lam)
    product = (b + dB) @ a
    return (b + dB) * (target * product).sum() / product.square().sum()


@given(SEEDS, WEIGHTS, st.sampled_from([0.0, 0.01, 1.0]), st.floats(1e-6, 1e6))
def test_the_cosine_form_is_the_dense_descent(seed: int, weights: list[float], lam: float, c: float) -> None:
    updates = [LoRA(u.A, {m: c * b for m, b in u.B.items()}) for u in clients(seed, weights)]
    fair, mean = LoRAFair("cosine", lam, steps=10), average(updates, weights)
    got = fair.aggregate(fresh(), updates, weights)
    for m, target in delta(stack(updates, weights)).items():
        want = dense_descent(fair, mean.B[m], mean.A[m], target)
        assert_close(got.B[m] / c, want / c, rtol=1e-8, atol=1e-8)
        assert cosine(target, delta(got)[m]) >= cosine(target, delta(mean)[m]) - 1e-12


def test_dp_lora_asks_for_clipped_examples_and_is_exact_for_b_alone() -> None:
    for trains, exact in (("AB", False), ("B", True)):
        strategy = load("dp_lora", trains=trains, clip="0.5")
        job = strategy.client_init(fresh(), CLIENT)
        assert (job.trains, job.shares, job.example_clip, strategy.exact) == (trains + "H", trains + "H", 0.5, exact)


def test_an_option_without_a_meaning_is_refused() -> None:
    for make in (lambda: DPLoRA(clip=0), lambda: FedSVD(-1), lambda: LoRAFair(lam=-1), lambda: FedRot(2)):
        with pytest.raises(ValueError, match=r"= (0|-1|2): "):
            make()


def test_la_lora_trains_b_in_a_rounds_first_steps_and_a_in_the_next_as_many() -> None:
    for every in (1, 3):
        job = LALoRA(every=every).client_init(LALoRA().init(fresh()), CLIENT)
        assert [job.sides_of(step) for step in range(4 * every)] == (["BH"] * every + ["AH"] * every) * 2
        assert set(job.trains) == set(job.shares) == set("ABH")
    assert sum(job.smoothing) == 1 and not LALoRA(smoothing=False).client_init(State(fresh(), 1), CLIENT).smoothing


@given(seed=SEEDS, weights=WEIGHTS)
def test_la_lora_averages_both_factors(seed: int, weights: list[float]) -> None:
    updates, p = clients(seed, weights), [w / sum(weights) for w in weights]
    state = LALoRA().aggregate(LALoRA().init(fresh()), updates, weights)
    for s in "ABH":
        for m, t in state.lora.side(s).items():
            wanted = sum((c * u.side(s)[m] for c, u in zip(p, updates, strict=True)), torch.zeros_like(t))
            assert_close(t, wanted, rtol=0, atol=1e-10)
    assert state.round == 1


def test_la_lora_with_a_whole_round_as_a_turn_is_rolora() -> None:
    assert apart(run(LALoRA(every=0, smoothing=False)), run(RoLoRA())) == 0


def test_rolora_trains_b_first_and_leaves_the_other_side_bit_for_bit() -> None:
    state = RoLoRA().init(fresh())
    for frozen in "ABAB":
        job = RoLoRA().client_init(state, CLIENT)
        state = RoLoRA().aggregate(state, [train(job, i) for i in range(2)], [1.0, 2.0])
        for s in "AB":
            assert all(torch.equal(t, state.lora.side(s)[m]) == (s == frozen) for m, t in job.start.side(s).items())
    assert (projector(state.lora.A["q"]) - projector(fresh().A["q"])).norm() > 1e-3  # it moves A where FedSVD turns it


def sketches(rank: int, rounds: int = 1, seed: int = 0, id: int = 0) -> list[Job]:
    state = FSLoRA().init(factors(0))
    return [FSLoRA(seed).client_init(state._replace(round=t), Client(id, 1, rank)) for t in range(rounds)]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_sketch_is_one_on_the_mean(rank: int) -> None:
    jobs = sketches(rank, rounds=5000)
    held = torch.tensor([[j in job.sketch["q"] for j in range(4)] for job in jobs]).double()
    assert_close(held.mean(0) * select_rows(jobs[0]).gain["q"], torch.ones(4).double(), rtol=0, atol=0.1)


def test_sketches_differ_by_round_client_module_and_seed_and_are_otherwise_the_same() -> None:
    assert sketches(2, 9)[8].sketch == sketches(2, 9)[8].sketch and not sketches(4)[0].sketch
    draws = [sketches(2, 30), [sketches(2, id=i)[0] for i in range(30)], [sketches(2, seed=i)[0] for i in range(30)]]
    for jobs in draws:
        assert len({tuple(job.sketch["q"]) for job in jobs}) == 6  # all pairs of four
    assert any(job.sketch["q"] != job.sketch["v"] for job in draws[0])


def test_a_direction_moves_by_the_share_of_those_who_trained_it() -> None:
    start, jobs = factors(0), [sketches(2, id=i)[0] for i in range(2)]
    zeros = [LoRA({m: 0 * a for m, a in x.A.items()}, x.B, x.H) for x in (select_rows(job).start for job in jobs)]
    updates = [scatter_rows(job, zero) for job, zero in zip(jobs, zeros, strict=True)]
    after = FSLoRA().aggregate(FSLoRA().init(start), updates, [1.0, 3.0]).lora
    for m, a in start.A.items():
        left = [1 - 0.25 * (j in jobs[0].sketch[m]) - 0.75 * (j in jobs[1].sketch[m]) for j in range(4)]
        assert_close(after.A[m], a * torch.tensor(left)[:, None].double())
        assert_close(after.B[m], start.B[m])


@given(SEEDS, RANKS, WEIGHTS)
def test_fed_sb_averages_its_cores_exactly(seed: int, rank: int, weights: list[float]) -> None:
    state = FedSB(seed).init(fresh(rank))
    cores = [LoRA(R={m: u.A[m][:, :1] @ u.B[m][:1] for m in SHAPES}) for u in clients(seed, weights, rank)]
    after = FedSB().aggregate(state, cores, weights)
    assert all(after.A[m] is state.A[m] and after.B[m] is state.B[m] for m in SHAPES)
    assert_close(delta(FedSB().adapter(after)), delta(stack([c.over(state) for c in cores], weights)))


@pytest.mark.parametrize("lora", [factors(1), fresh()], ids=["B", "B = 0"])
def test_fed_sb_starts_at_the_given_product_between_orthonormal_frames(lora: LoRA) -> None:
    state = FedSB().init(lora)
    assert_close(delta(state), delta(lora))
    for m, b in lora.B.items():
        assert_close(state.A[m].T @ state.A[m], projector(lora.A[m]))
        assert_close(state.B[m].T @ state.B[m], torch.eye(4, dtype=b.dtype))
        assert bool(b.any()) == torch.allclose(projector(state.B[m].T), projector(b.T)) == bool(state.R[m].any())


def test_fed_sb_draws_b_by_seed_and_module() -> None:
    twins = LoRA({m: torch.ones(2, 3) for m in "xy"}, {m: torch.zeros(4, 2) for m in "xy"})
    first, again, other = (FedSB(seed).init(twins).B for seed in (0, 0, 1))
    assert_close(first, again)
    assert not torch.allclose(first["x"], first["y"]) and not torch.allclose(first["x"], other["x"])


def rotate(last: LoRA, t: int, updates: Sequence[LoRA], soft: float = 1.0) -> LoRA:
    return FedRot(soft).aggregate(FedRot().init(last)._replace(round=t), updates, [1.0] * len(updates)).lora


@given(SEEDS, RANKS, st.sampled_from([0, 1]))
def test_fedrot_does_not_see_in_which_rotation_a_client_sends(seed: int, rank: int, t: int) -> None:
    last, other, x = (factors(seed + i, rank) for i in range(3))
    G = rotation(factors(seed + 3, rank).A["q"][:, :rank], 1.0)
    assert float(torch.linalg.det(G)) == pytest.approx(1)  # as the paper has it: a reflection is not undone
    turned = LoRA({m: G.T @ a for m, a in x.A.items()}, {m: b @ G for m, b in x.B.items()}, x.H)
    got, want = rotate(last, t, [turned, other]), rotate(last, t, [x, other])
    assert_close((got.A, got.B), (want.A, want.B), rtol=1e-5, atol=1e-5)


@given(SEEDS, RANKS, st.sampled_from([0, 1]), st.floats(0, 1))
def test_fedrot_leaves_a_clients_product_as_it_is(seed: int, rank: int, t: int, soft: float) -> None:
    x = factors(seed, rank)
    got = rotate(factors(seed + 9, rank), t, [x], soft)
    assert_close((dict(delta(got)), got.H), (dict(delta(x)), x.H))


@pytest.mark.parametrize(("t", "side"), [(0, "A"), (1, "B"), (2, "A")])
def test_fedrot_aligns_a_in_one_round_and_b_in_the_next(t: int, side: str) -> None:
    was, now = factors(1).side(side), rotate(factors(9), t, [factors(1)]).side(side)
    for m, x in factors(9).side(side).items():
        M = now[m] @ x.T if side == "A" else x.T @ now[m]
        assert_close(M, M.T)  # no rotation that is near brings it closer
        assert (now[m] - x).norm() < (was[m] - x).norm()


@pytest.mark.parametrize("t", [0, 1])
def test_fedrot_is_fedit_where_all_are_aligned(t: int) -> None:
    last, other = factors(9), clients(0, [1, 1])
    updates = [LoRA({m: 2 * a for m, a in last.A.items()}, u.B) if t == 0 else LoRA(u.A, last.B) for u in other]
    got, want = rotate(last, t, updates), average(updates, [1, 1])
    assert_close((got.A, got.B), (want.A, want.B))


def test_fedrot_does_not_turn_what_the_last_b_says_nothing_of() -> None:
    Q = rotation(factors(7).A["q"][:, :4], 1.0)
    G = Q @ torch.block_diag(torch.tensor([[0.8, -0.6], [0.6, 0.8]]), torch.eye(2)).double() @ Q.T
    for rank in (0, 2):  # of the last B
        last = LoRA(fresh().A, {m: b * (torch.arange(4) < rank) @ Q.T for m, b in factors(3).B.items()})
        x = LoRA(factors(1).A, {m: b @ G for m, b in last.B.items()})
        assert_close(rotate(last, 1, [x]).A, {m: G @ a if rank else a for m, a in x.A.items()}, rtol=0, atol=0.01)


def dual_rounds(strategy: Strategy[Any], targets: Sequence[int], rounds: int = 3) -> tuple[Any, list[LoRA]]:
    """The state after rounds of clients, each with a matrix of its own to fit, and what each starts its next job with.

    In the second round the first client sleeps.
    """
    state, kept = strategy.init(fresh()), [LoRA()] * len(targets)
    for t in range(rounds):
        job, sent = strategy.client_init(state, CLIENT), {}
        for i in range(1 if t == 1 else 0, len(targets)):
            trained = train(replace(job, start=start_with(job, kept[i]), shares="ABH", keeps_rank=0), targets[i])
            kept[i], sent[i] = kept_part(job, trained), shared_part(job, trained)
        state = strategy.aggregate(state, list(sent.values()), [1.0 + targets[i] for i in sent])
    job = strategy.client_init(state, CLIENT)
    return state, [start_with(job, own) for own in kept]


def test_dual_without_rows_of_its_own_is_fedit_bit_for_bit() -> None:
    one, other = dual_rounds(Dual(0), [0, 1, 2])[0], dual_rounds(FedAvg(), [0, 1, 2])[0]
    assert all(torch.equal(t, other.side(s)[m]) for s, m, t in one.matrices())


def test_dual_averages_the_shared_rows_and_has_a_new_client_begin_with_the_common_model() -> None:
    state, _ = dual_rounds(Dual(2), [0, 1, 2])
    updates, weights = clients(5, [1.0, 2.0], rank=2), [1.0, 2.0]
    after = Dual(2).aggregate(state, updates, weights)
    mean = average(updates, weights)
    assert_close(vars(split_rank(after, 2)[0]), vars(mean))
    assert_close(delta(Dual(2).adapter(after)), delta(mean))  # the rows of a new client add nothing
    assert all(bool(a[2:].any()) for a in after.A.values())  # and its A can learn: it is not zero


def test_dual_leaves_each_client_its_own_rows_whoever_trains_in_between() -> None:
    """In another order of the clients each has the model that it had; one that slept goes on from what it had."""
    _, models = dual_rounds(Dual(2), [0, 1, 2])
    _, turned = dual_rounds(Dual(2), [0, 2, 1])
    for one, other in zip(models, [turned[0], turned[2], turned[1]], strict=True):
        assert_close(delta(one), delta(other))
    rows = [split_rank(model, 2)[1] for model in models]
    assert not torch.allclose(rows[0].A["q"], rows[1].A["q"])
    _, before = dual_rounds(Dual(2), [0, 1, 2], rounds=1)
    _, slept = dual_rounds(Dual(2), [0, 1, 2], rounds=2)
    assert_close(vars(split_rank(slept[0], 2)[1]), vars(split_rank(before[0], 2)[1]), rtol=0, atol=0)
