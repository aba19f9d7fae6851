"""What every strategy must do, whatever its mathematics: a new file in strategies/ is tested with no other edit."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora import checkpoint
from fedlora.catalogue import catalogue
from fedlora.checkpoint import Checkpoint
from fedlora.lora import SIDES, LoRA, average, delta, join, stack
from fedlora.strategies.head import Head
from fedlora.strategy import Client, Job, Strategy, load
from tests.conftest import factors, fresh

NAMES = [entry.name for entry in catalogue() if entry.cls.__module__.startswith("fedlora.strategies.")]
CLIENT = Client(id=0, examples=1, rank=4)
WEIGHTS = [1.0, 2.0, 3.0]
Any_ = Strategy[Any]


def trained(job: Job, seed: int) -> LoRA:
    """A client that moves what it is told to, at random."""
    moved, start = factors(seed, next(iter(job.start.A.values())).shape[0]), job.start
    return moved.only(job.trains).over(start)


def play(strategy: Any_, state: Any, seeds: Sequence[int] = (1, 2, 3)) -> list[LoRA]:
    job = strategy.client_init(state, CLIENT)
    return [trained(job, s).only(job.shares) for s in seeds]


def model(strategy: Any_, state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """What a client would compute with: s B A for every module, and the head."""
    job = strategy.client_init(state, CLIENT)
    return dict(delta(join(*job.offset, job.start))), job.start.H


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> Any_:
    return load(request.param)


@pytest.fixture
def state(strategy: Any_) -> Any:
    """After one round: nothing is zero any more."""
    state = strategy.init(fresh())
    return strategy.aggregate(state, play(strategy, state, (7, 8)), [1.0, 1.0])


def test_scaling_all_weights_changes_nothing(strategy: Any_, state: Any) -> None:
    updates = play(strategy, state)
    one, ten = (strategy.aggregate(state, updates, [c * w for w in WEIGHTS]) for c in (1, 10))
    assert_close(model(strategy, one), model(strategy, ten))


def test_order_of_clients_changes_nothing(strategy: Any_, state: Any) -> None:
    updates = play(strategy, state)
    there = strategy.aggregate(state, updates, WEIGHTS)
    back = strategy.aggregate(state, updates[::-1], WEIGHTS[::-1])
    assert_close(model(strategy, there), model(strategy, back))


def test_aggregate_leaves_its_arguments_alone(strategy: Any_, state: Any) -> None:
    updates = play(strategy, state)
    before = copy.deepcopy((state, updates))
    strategy.aggregate(state, updates, WEIGHTS)
    for was, now in zip(leaves(before), leaves((state, updates)), strict=True):
        assert torch.equal(was, now)


def test_state_survives_a_checkpoint(strategy: Any_, state: Any, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Checkpoint(1, state, {}))
    back = checkpoint.latest(tmp_path)
    assert back is not None
    for was, now in zip(leaves(state), leaves(back.state), strict=True):
        assert torch.equal(was, now)
    assert_close(model(strategy, back.state), model(strategy, state), rtol=0, atol=0)


def test_exactness_is_as_declared(strategy: Any_) -> None:
    """`exact` says whether the new model is the weighted mean of the clients' models."""
    state = strategy.init(fresh())
    for _ in range(3):
        job = strategy.client_init(state, CLIENT)
        local = [trained(job, s) for s in (1, 2, 3)]
        ideal = delta(stack([join(*job.offset, x) for x in local], WEIGHTS))
        state = strategy.aggregate(state, [x.only(job.shares) for x in local], WEIGHTS)
        got = model(strategy, state)[0]
        close = all(torch.allclose(got[m], ideal[m]) for m in ideal)
        assert close == strategy.exact


def test_what_is_delivered_is_what_clients_start_from(strategy: Any_, state: Any) -> None:
    adapter = strategy.adapter(state)
    assert_close((dict(delta(adapter)), adapter.H), model(strategy, state))


def test_a_job_brings_every_side_and_shares_only_what_it_trains(strategy: Any_, state: Any) -> None:
    job = strategy.client_init(state, CLIENT)
    assert all(job.start.side(s) for s in "ABH")
    assert set(job.shares) <= set(job.trains) <= set(SIDES)


def test_a_frozen_side_is_the_same_for_all_rounds(strategy: Any_, state: Any) -> None:
    job = strategy.client_init(state, CLIENT)
    later = strategy.client_init(strategy.aggregate(state, play(strategy, state), WEIGHTS), CLIENT)
    for side in set(SIDES) - set(job.trains):
        assert all(torch.equal(job.start.side(side)[m], t) for m, t in later.start.side(side).items())


def test_one_client_alone_is_followed(strategy: Any_, state: Any) -> None:
    job = strategy.client_init(state, CLIENT)
    alone = trained(job, 5)
    after = strategy.aggregate(state, [alone.only(job.shares)], [3.0])
    if job.shares == job.trains:
        assert_close(model(strategy, after)[0], dict(delta(join(*job.offset, alone))))


def test_sums_are_enough_where_it_says_so(strategy: Any_, state: Any) -> None:
    """One update that is the weighted mean of all does what all of them do."""
    updates = play(strategy, state)
    whole = model(strategy, strategy.aggregate(state, updates, WEIGHTS))[0]
    summed = model(strategy, strategy.aggregate(state, [average(updates, WEIGHTS)], [6.0]))[0]
    assert all(torch.allclose(whole[m], summed[m]) for m in whole) == strategy.sums_only


@pytest.mark.parametrize("policy", ["local", "frozen"])
def test_a_head_that_is_not_shared_stays_as_the_server_has_it(strategy: Any_, policy: Any) -> None:
    wrapped = Head(strategy, policy)
    state = wrapped.init(fresh())
    job = wrapped.client_init(state, CLIENT)
    assert "H" not in job.shares and ("H" in job.trains) == (policy == "local")
    after = wrapped.aggregate(state, [trained(job, s).only(job.shares) for s in (1, 2)], [1.0, 1.0])
    assert_close(wrapped.adapter(after).H, fresh().H)


def test_the_paper_is_named(strategy: Any_) -> None:
    entry = next(e for e in catalogue() if e.cls is type(strategy))
    assert entry.paper.startswith("https://") and entry.title


def leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of a state, in a fixed order."""
    return list(checkpoint.pack(tree)[0].values())
