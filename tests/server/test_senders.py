"""Strategies that must know who sent what, and clients that train in ways of their own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.checks import on_random_factors, on_small_models
from fedlora.checks.contract import CHECKS, Check, label
from fedlora.checks.small_models import RANKS, small_model
from fedlora.checks.verdict import Skip, identical
from fedlora.config import build
from fedlora.errors import PrivacyError, StrategyError
from fedlora.jobs import PrivacyTerms
from fedlora.lora import LoRA, scale
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.compose import compose
from fedlora.run.directory import RunDirectory
from fedlora.run.plan import Plan, job_for
from fedlora.sections import Encoding, PrivacyConfig, SecureConfig, Training
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.capped import Capped
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fslora import FSLoRA
from fedlora.strategies.head import Head
from fedlora.strategies.robust import Robust
from fedlora.strategies.server_optimizer import ServerOptimizer
from fedlora.strategy import Client, Job, Sender, Strategy, load, next_state
from tests.support.adapters import factors, fresh
from tests.support.bugs import ClustersSaySums
from tests.support.clustered import Clustered
from tests.support.cohorts import furthest

SMALL = small_model("bert")
PLAN = Plan(4, cohort=2, training=Training(lr=1e-2, steps=2, batch_size=4), evaluate_clients=True)
BY_ITS_OWN_RULE = {
    on_random_factors.check_what_is_delivered_is_what_clients_start_from,
    on_random_factors.check_a_client_that_slept_is_right_after_one_job,
    on_small_models.check_a_client_that_slept_computes_with_the_model,
}


def fleet(folder: Path) -> Serial:
    return Serial(SMALL.model, SMALL.clients, RANKS, folder)


@pytest.mark.parametrize("check", CHECKS, ids=label)
def test_a_clustered_strategy_keeps_the_contract(check: Check) -> None:
    skip = check(Clustered())
    assert (check in BY_ITS_OWN_RULE) <= isinstance(skip, Skip)


@pytest.mark.parametrize(
    "wrapped",
    [
        Head(Clustered(), "frozen"),
        Anchored(Clustered()),
        Capped(Clustered(), 4),
        Robust(Clustered(), "norm_bound", bound=1e9),
        ServerOptimizer(Clustered(), "momentum", lr=1.0, beta1=0.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_wrapper_passes_the_senders_on(wrapped: Strategy[Any]) -> None:
    state = wrapped.init(fresh())
    updates = [wrapped.client_init(state, Client(i, 1, 4)).start.over(factors(i)) for i in range(3)]
    after = next_state(wrapped, state, updates, [1.0] * 3, [Sender(i, 1, loss=float(i)) for i in range(3)])
    assert wrapped.needs_senders and (after.inner if hasattr(after, "inner") else after).losses == {0: 0, 1: 1, 2: 2}


def test_krum_passes_on_the_senders_of_what_it_likes() -> None:
    wrapped = Robust(Clustered(), "multi_krum", byzantine=1)
    updates = [scale(fresh(), 1 + 0.01 * i) for i in range(5)] + [factors(9)]
    senders = [Sender(i, 1, loss=float(i)) for i in range(6)]
    after = next_state(wrapped, wrapped.init(fresh()), updates, [1.0] * 6, senders)
    assert set(after.losses) == {0, 1, 2, 3, 4}


def test_a_sender_comes_with_what_it_told(tmp_path: Path) -> None:
    state = [done.state for done in fit(Clustered(), fleet(tmp_path), SMALL.start, PLAN)][-1]
    assert len(state.losses) == 3 and all(loss > 0 for loss in state.losses.values())
    assert any(scores.keys() == {"loss", "accuracy", "macro_f1"} for scores in state.scores.values())


def test_no_loss_is_told_where_clients_may_not_tell_it(tmp_path: Path) -> None:
    state = [done.state for done in fit(Clustered(), fleet(tmp_path), SMALL.start, replace(PLAN, metrics=False))][-1]
    assert not state.losses and state.scores


def test_a_run_that_is_resumed_ends_with_the_same_clusters(tmp_path: Path) -> None:
    whole = [done.state for done in fit(Clustered(), fleet(tmp_path / "one"), SMALL.start, PLAN)][-1]
    for stop in (2, 4):
        folder = RunDirectory(tmp_path / "run")
        for done in fit(Clustered(), fleet(tmp_path / "two"), SMALL.start, PLAN, folder.resume_point()):
            folder.save(done, done.record())
            if done.number == stop:
                break
        folder.close()
    past = folder.resume_point()
    assert past is not None and past.rounds == 4 and identical(past.state, whole)


@pytest.mark.parametrize(
    ("key", "says"), [("secure.aggregation", "secure.aggregation hides each"), ("dp.level", "dp.level = client hides")]
)
def test_where_the_server_gets_sums_alone_such_a_strategy_is_refused(key: str, says: str) -> None:
    value = {"secure.aggregation": {key: True}, "dp.level": {key: "client", "dp.epsilon": 8.0}}[key]
    config = build({"strategy": "tests.support.clustered:Clustered", **value})
    with pytest.raises(PrivacyError, match=rf"Clustered needs to know which client sent which update, and {says}"):
        compose(config, fresh())


def test_the_loop_refuses_it_too(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="Clustered must know which client sent which update"):
        next(fit(Clustered(), fleet(tmp_path), SMALL.start, replace(PLAN, secure=SecureConfig(aggregation=True))))


def test_a_sum_has_no_sender(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match="ClustersSaySums declares needs_senders and sums_only"):
        load("tests.support.bugs:ClustersSaySums")
    with pytest.raises(StrategyError, match="a sum of updates has no sender"):
        next(fit(ClustersSaySums(), fleet(tmp_path), SMALL.start, PLAN))


@dataclass(frozen=True)
class Slower(FedAvg):
    """Clients of odd ids train at a fraction of the run's rate, and all by plain SGD."""

    factor: float = 0.5
    overrides: tuple[tuple[str, Any], ...] = (("optimizer", "sgd"), ("clip", 0.0))

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, overrides=dict(self.overrides), lr_factor=self.factor if client.id % 2 else 1.0)


@pytest.mark.parametrize("check", [on_random_factors.check_jobs_leave_to_the_run_what_it_fills_in], ids=label)
def test_settings_of_a_clients_own_keep_the_contract(check: Check) -> None:
    assert check(Slower()) is None


def test_a_client_trains_at_a_rate_of_its_own(tmp_path: Path) -> None:
    """One step of SGD at half the rate goes half as far."""
    plan = replace(PLAN, rounds=1, cohort=3, training=Training(lr=0.1, steps=1, batch_size=4))
    moved = []
    for factor in (1.0, 0.5):
        strategy = Slower(factor)
        jobs = {1: job_for(strategy, SMALL.start, Client(1, 1, RANKS[1]), plan, t=0)}
        update: Any = dict(fleet(tmp_path / str(factor)).train(jobs))[1]
        moved.append({m: b - SMALL.start.B[m] for m, b in update.lora.B.items()})
    for m, whole in moved[0].items():
        assert whole.any()
        torch.testing.assert_close(moved[1][m], whole / 2, rtol=1e-4, atol=1e-8)


def test_what_a_job_overrides_is_told_and_the_rest_is_the_runs() -> None:
    job = job_for(Slower(), fresh(), Client(3, 1, 4), PLAN, t=0)
    assert job.training == replace(PLAN.training, optimizer="sgd", clip=0.0, lr=0.5e-2)
    assert not job.overrides and job.lr_factor == 1.0


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (Slower(overrides=(("lrr", 1),)), 'Slower overrides "lrr", no training setting; did you mean "lr"?'),
        (Slower(overrides=(("batch_size", 0),)), "Slower makes train.batch_size = 0 by overrides and lr_factor"),
        (Slower(factor=-1.0), "Slower makes train.lr = -0.01 by overrides and lr_factor"),
    ],
    ids=["name", "value", "factor"],
)
def test_what_cannot_be_overridden_is_refused(strategy: Strategy[Any], says: str) -> None:
    with pytest.raises(StrategyError, match=says.replace("?", r"\?")):
        job_for(strategy, fresh(), Client(1, 1, 4), PLAN, t=0)


@dataclass(frozen=True)
class Sets(FedAvg):
    """It sets in its jobs what the run fills in."""

    values: tuple[tuple[str, Any], ...] = ()

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, **dict(self.values))


INT8: Encoding = "int8"
TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=2, delta=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training", Training()),
        ("training", Training(lr=1.0)),
        ("privacy", TERMS),
        ("metrics", False),
        ("upload", INT8),
        ("feedback", True),
        ("seed", 7),
        ("round", 3),
        ("rounds", 9),
    ],
)
def test_what_the_run_fills_in_is_not_silently_overwritten(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match=f"strategy Sets sets {name} in a Job, which the run fills in"):
        next(fit(Head(Sets(((name, value),)), "local"), fleet(tmp_path), SMALL.start, PLAN))


@pytest.mark.parametrize("name", ["epochs", "steps", "batch_size", "accumulate", "clip"])
def test_a_private_run_trains_as_its_noise_was_computed_for(name: str, tmp_path: Path) -> None:
    terms = RecordLevelDP(config=PrivacyConfig(noise=1.0, delta=1e-3), training=PLAN.training, rounds=PLAN.rounds)
    plan = replace(PLAN, record_level=terms, metrics=False, evaluate_clients=False)
    with pytest.raises(PrivacyError, match=rf"Slower overrides train.{name} for client \d, and a private run"):
        next(fit(Slower(overrides=((name, 1),)), fleet(tmp_path), SMALL.start, plan))
    assert not list(tmp_path.rglob("ledger*"))


def test_a_private_run_takes_a_rate_of_a_clients_own(tmp_path: Path) -> None:
    terms = RecordLevelDP(config=PrivacyConfig(noise=1.0, delta=1e-3), training=PLAN.training, rounds=1)
    plan = replace(PLAN, rounds=1, record_level=terms, metrics=False, evaluate_clients=False)
    (done,) = fit(Slower(overrides=()), fleet(tmp_path), SMALL.start, plan)
    assert not done.failed and done.spent


@pytest.mark.parametrize(("steps", "is_fedit"), [(1, True), (2, False)])
def test_scaffold_corrects_what_is_clipped_and_noised(steps: int, is_fedit: bool, tmp_path: Path) -> None:
    """The corrections of all clients cancel in the mean, so that nothing is left of them after one step a round."""
    training = Training(optimizer="sgd", lr=0.1, steps=steps, batch_size=4)
    dp = PrivacyConfig(noise=0.5, delta=1e-3, rate=0.5, seeded=True)
    terms = RecordLevelDP(config=dp, training=training, rounds=3)
    plan = Plan(3, cohort=len(SMALL.clients), training=training, record_level=terms, metrics=False)
    ends = []
    for name in ("fedavg", "scaffold"):
        strategy = load(name)
        (*_, last) = fit(strategy, fleet(tmp_path / name), SMALL.start, plan)
        ends.append(strategy.adapter(last.state))
    assert not last.failed and (furthest(*ends) < 1e-6) == is_fedit


@dataclass(frozen=True)
class Doubles(FSLoRA):
    """A gain of its own on top of a sketch's."""

    def client_init(self, state: Any, client: Client) -> Job:
        return replace(super().client_init(state, client), gain=dict.fromkeys(state.lora.A, 2.0))


def test_a_gain_of_the_strategys_own_is_kept_beside_a_sketchs() -> None:
    from fedlora.messages.sketch import select_rows

    job = select_rows(job_for(Doubles(), FSLoRA().init(fresh()), Client(0, 1, 2), PLAN, t=0))
    assert job.gain == dict.fromkeys(fresh().A, 2.0 * 4 / 2)
