"""RAVAN: cores in heads between frozen frames, against its rule written out densely, and as Fed-SB of one head."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.checks.federation import small_federation
from fedlora.checks.small_models import small_model
from fedlora.client import training
from fedlora.errors import StrategyError, WireError
from fedlora.jobs import Job
from fedlora.lora import LoRA, delta, euclidean_norm, map_factors
from fedlora.messages import codec
from fedlora.messages.envelope import unpack
from fedlora.messages.parts import Parts, unflatten
from fedlora.run.plan import Plan, job_for
from fedlora.sections import Training
from fedlora.strategies.fed_sb import FedSB
from fedlora.strategies.ravan import Ravan
from fedlora.strategy import Client, load
from tests.support.adapters import SHAPES, factors, fresh
from tests.support.bugs import LosesItsScales
from tests.support.cohorts import double, filled, in_one_pass, one_by_one, tasks_of
from tests.support.float64 import in_float64

CLIENT = Client(0, 1, 4)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=4)


def trained(state: LoRA, seed: int) -> LoRA:
    """What a client sends: its cores and its head, moved."""
    g = torch.Generator().manual_seed(seed)
    return map_factors(lambda t: t + torch.randn(t.shape, generator=g, dtype=t.dtype), state.only("RH"))


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), WEIGHTS)
def test_its_model_is_the_mean_of_the_sums_over_heads(seed: int, heads: int, weights: list[float]) -> None:
    strategy = Ravan(heads=heads)
    state = strategy.init(fresh())
    updates = [trained(state, seed + i) for i in range(len(weights))]
    after = strategy.aggregate(state, updates, weights)
    k, total = 4 // heads, sum(weights)
    for m in SHAPES:
        wanted = torch.zeros(SHAPES[m], dtype=torch.float64)
        for w, update in zip(weights, updates, strict=True):
            for i, core in enumerate(update.R[m].view(heads, k, k)):
                own = slice(i * k, (i + 1) * k)
                wanted += w / total * state.B[m][:, own] @ core @ state.A[m][own]
        assert_close(delta(strategy.adapter(after))[m], wanted, rtol=1e-10, atol=1e-10)
        assert after.A[m] is state.A[m] and after.B[m] is state.B[m]


def test_heads_are_orthogonal_so_that_ranks_add_up_and_norms_are_those_of_the_cores() -> None:
    state = Ravan(heads=2).init(fresh())
    after = trained(state, 1).over(state)
    for m, product in delta(after).items():
        assert_close(state.A[m] @ state.A[m].T, torch.eye(4, dtype=torch.float64))
        assert_close(state.B[m].T @ state.B[m], torch.eye(4, dtype=torch.float64))
        assert int(torch.linalg.matrix_rank(product)) == 4  # h k, of 8 numbers
        assert float(product.norm()) == pytest.approx(float(after.R[m].norm()))


def test_one_head_without_scales_is_fed_sb_bit_for_bit() -> None:
    small, ends = small_model("bert"), []
    for strategy in (load("ravan", heads=1, scales=False), load("fed_sb")):
        with small_federation(strategy, small) as federation:
            ends.append(federation.played()[-1].state)
    assert all(torch.equal(t, ends[1].side(s)[m]) for s, m, t in ends[0].matrices())
    assert euclidean_norm(ends[0].only("R")) > 0


@pytest.mark.parametrize("heads", [1, 2])
def test_one_step_moves_a_head_as_its_scale_says(heads: int) -> None:
    """H - eta G - eta <G, H> H + eta^2 <G, H> G of each head, where G is its gradient and H where it was."""
    small, eta, blocks = small_model("bert"), 0.5, (heads, 2 // heads, 2 // heads)
    start = double(Ravan(heads=heads).init(filled(small.start, 0)))
    sgd = Training(optimizer="sgd", lr=eta, steps=1, batch_size=32, clip=0)
    jobs = [Job(start, trains="RH", shares="RH", training=sgd, scales=scales) for scales in (False, True)]
    with in_float64(small.model):
        for train in (one_by_one, in_one_pass):
            (plain, _), (moved, _) = (train(small, tasks_of(small, [job]))[0] for job in jobs)
            for m, core in start.R.items():
                H = core.view(blocks)
                G = (H - plain.lora.R[m].view(blocks)) / eta
                along = (G * H).sum((1, 2), keepdim=True)
                wanted = H - eta * G - eta * along * H + eta**2 * along * G
                assert_close(moved.lora.R[m].view(blocks), wanted, rtol=1e-9, atol=1e-12)


def test_scales_that_were_sent_begin_anew_at_one() -> None:
    small = small_model("bert")
    job = Job(Ravan().init(filled(small.start, 0)), trains="RH", shares="RH", scales=True, training=Training(steps=3))
    with in_float64(small.model):
        update, kept = training.perform(small.model, tasks_of(small, [replace(job, start=double(job.start))])[0])
        assert not kept
        training.load_start(small.model, replace(job, start=update.lora.over(job.start)), LoRA())
        assert all(bool((s == 1).all()) for s in small.model.set_trainable("S"))


def test_of_a_given_product_it_keeps_the_blocks_on_the_diagonal_of_fed_sbs_core() -> None:
    whole, state = FedSB().init(factors(1)), Ravan(heads=2).init(factors(1))
    for m, core in whole.R.items():
        assert_close(state.R[m], torch.stack([core[:2, :2], core[2:, 2:]]), rtol=0, atol=0)


def test_a_start_of_principal_directions_is_in_its_heads_whole() -> None:
    """PiSSA's A and B have orthogonal rows and columns, so that the core between their frames is diagonal."""
    q, s, vh = torch.linalg.svd(delta(factors(1))["q"], full_matrices=False)
    given = LoRA({"q": s[:4].sqrt()[:, None] * vh[:4]}, {"q": q[:, :4] * s[:4].sqrt()})
    assert_close(delta(Ravan(heads=2).init(given))["q"], delta(given)["q"])


def test_heads_that_do_not_divide_the_rank_are_refused_by_name() -> None:
    with pytest.raises(
        StrategyError, match=r"heads = 3 do not divide the rank 4 of q; choose heads that do, or another"
    ):
        Ravan(heads=3).init(fresh())
    with pytest.raises(StrategyError, match=r"heads = 0: an adapter has one at least"):
        load("ravan", heads=0)


def test_scales_without_a_core_that_is_trained_and_sent_are_refused_on_both_sides() -> None:
    strategy = LosesItsScales()
    state = strategy.init(fresh())
    with pytest.raises(StrategyError, match=r"sets scales in a Job that trains RH and shares H"):
        job_for(strategy, state, CLIENT, Plan(rounds=1, cohort=1), 0)
    for job in (strategy.client_init(state, CLIENT), Job(fresh(), scales=True)):
        parts = Parts().of(job)
        incoming = codec.read_job(unpack(codec.JobEncoder().job(job, parts, parts)))
        with pytest.raises(WireError, match=r"a core R, and trains none, keeps it, or trains it in turn"):
            incoming.job({name: unflatten(part.content) for name, part in incoming.sent.items()})


def test_numbers_sent_fall_with_the_heads() -> None:
    for heads in (1, 2, 4):
        job = Ravan(heads=heads).client_init(Ravan(heads=heads).init(fresh()), CLIENT)
        assert sum(core.numel() for core in job.start.R.values()) == len(SHAPES) * 16 // heads
