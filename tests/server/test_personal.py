"""After the last round clients go on by themselves: what they come to, what is told of it, and that nothing leaves."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.checks.small_models import small_model
from fedlora.client.policy import ClientPolicy
from fedlora.client.runner import JobRunner
from fedlora.errors import ClientFailed, PolicyRefusal, PrivacyError
from fedlora.jobs import HIGHEST_RANK, PrivacyTerms, Update, start_with
from fedlora.lora import LoRA, difference, euclidean_norm, map_factors
from fedlora.metrics import Metrics
from fedlora.models import peft_files
from fedlora.run.plan import Plan
from fedlora.sections import PersonalConfig, SecureConfig, Training
from fedlora.server.personal import _figures, personalise, stage_job
from fedlora.server.rounds import Fleet, fit
from fedlora.simulations.serial import Serial
from fedlora.simulations.stacked import Stacked
from fedlora.storage.client_state import ClientState
from fedlora.storage.own_model import own_model
from fedlora.strategy import Strategy, load
from tests.support.float64 import in_float64

SMALL = small_model("bert")
RANKS = (2, 2, 2)
PERSONAL = PersonalConfig(steps=3, alone=True)
PLAN = Plan(rounds=2, cohort=3, training=Training(lr=1e-2, batch_size=3, steps=2), personal=PERSONAL)


def serial(folder: Path, policy: ClientPolicy = ClientPolicy()) -> Serial:  # noqa: B008
    return Serial(SMALL.model, SMALL.clients, RANKS, folder, policy=policy)


def done(
    strategy: Strategy[Any], fleet: Fleet, plan: Plan = PLAN, start: LoRA = SMALL.start
) -> tuple[Any, dict[str, Any]]:
    """The state after the rounds, and what is told of the stages after them."""
    state = list(fit(strategy, fleet, start, plan))[-1].state
    return state, personalise(strategy, state, fleet, start, plan, plan.rounds)


def left(folder: Path, stage: str = "personal") -> list[LoRA]:
    """What a stage has left with each client."""
    return [ClientState(folder / str(i), stage).of(PLAN.rounds - 1) for i in range(3)]


@pytest.mark.parametrize("name", ["dual", "rolora"])
def test_every_engine_comes_to_the_same_models(name: str, tmp_path: Path) -> None:
    """And each client's model is another; it has all sides that the run ever trained."""
    strategy = load(name)
    with in_float64(SMALL.model):
        start = map_factors(torch.Tensor.double, SMALL.start)
        fleets = {k: k(SMALL.model, SMALL.clients, RANKS, tmp_path / k.__name__) for k in (Serial, Stacked)}
        states = [done(strategy, fleet, start=start)[0] for fleet in fleets.values()]
    assert len(states) == 2
    for stage in ("personal", "alone"):
        one, other = (left(tmp_path / kind.__name__, stage) for kind in fleets)
        for mine, theirs in zip(one, other, strict=True):
            assert all(mine.side(s) for s in "ABH")
            assert max(float((t - theirs.side(s)[m]).abs().max()) for s, m, t in mine.matrices()) < 1e-7
        assert euclidean_norm(difference(one[0], one[1])) > 1e-3


def test_a_client_goes_on_from_the_model_it_has_and_dittos_term_holds_it_there(tmp_path: Path) -> None:
    strategy = load("fedsa_lora")
    distances = []
    for prox in (0.0, 10.0):
        folder = tmp_path / f"{prox}"
        state, _ = done(strategy, serial(folder), replace(PLAN, rounds=1, personal=PersonalConfig(steps=3, prox=prox)))
        job = strategy.client_init(state, HIGHEST_RANK)
        begun = start_with(*own_model(job, folder / "0"))
        distances.append(euclidean_norm(difference(ClientState(folder / "0", "personal").of(0), begun)))
    assert distances[0] > distances[1] > 0


def test_of_each_kind_of_model_mean_worst_and_spread_are_told_and_who_has_lost(tmp_path: Path) -> None:
    _, told = done(load("fedavg"), serial(tmp_path), replace(PLAN, evaluate_clients=True))
    assert set(told["rows"]) == set(told["each"]) == {"before", "personal", "alone"}
    assert {figures["clients"] for figures in told["rows"].values()} == {3}
    assert told["failed"] == {"personal": {}, "alone": {}} and json.dumps(told)
    values = {"before": {0: 0.5, 1: 0.5}, "personal": {0: 0.25, 1: 0.75}}
    metrics = {
        row: {i: Metrics(4, 4, 1.0, int(4 * x), confusion=torch.eye(2, dtype=torch.int64)) for i, x in v.items()}
        for row, v in values.items()
    }
    assert _figures(metrics)["lost"] == {"personal": [0]}


def test_nothing_of_it_is_sent_and_scores_are_asked_for_only_where_they_are_told(tmp_path: Path) -> None:
    strategy, fleet = load("fedavg"), serial(tmp_path)
    state = list(fit(strategy, fleet, SMALL.start, PLAN))[-1].state
    up = fleet.traffic.up
    for plan in (replace(PLAN, metrics=False), replace(PLAN, secure=SecureConfig(aggregation=True))):
        told = personalise(strategy, state, fleet, SMALL.start, replace(plan, evaluate_clients=True), 2)
        assert "rows" not in told
    assert fleet.traffic.up == up
    job = stage_job(strategy, state, fleet.clients()[0], PLAN, "personal", 1)
    answer = dict(fleet.train({0: job}))[0]
    assert isinstance(answer, Update) and not answer.lora and answer.loss is None and answer.spent is None


TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=1, delta=1e-5)


def test_a_private_client_does_it_without_noise_and_is_not_charged(tmp_path: Path) -> None:
    policy = ClientPolicy(private=True, metrics=False, masked=True, noise=1.0, delta=1e-5, seeded=False)
    runner, strategy = JobRunner(0, SMALL.clients[0], tmp_path, policy), load("fedavg")
    job = stage_job(strategy, strategy.init(SMALL.start), HIGHEST_RANK, PLAN, "personal", 1)
    assert not runner.run(SMALL.model, job).lora
    assert runner.ledger.charges() == [] and ClientState(tmp_path, "personal").of(1)
    for wrong in (replace(job, metrics=True), replace(job, privacy=TERMS)):
        with pytest.raises(PolicyRefusal, match="word of what this client does for its own use"):
            runner.run(SMALL.model, wrong)
    with pytest.raises(PrivacyError):  # a round without noise is another matter
        runner.run(SMALL.model, replace(job, stage="round"))


def test_on_a_machine_of_its_own_a_client_finds_its_adapter_as_others_load_it(tmp_path: Path) -> None:
    runner, strategy = JobRunner(0, SMALL.clients[0], tmp_path, once=True), load("fedavg")
    job = stage_job(strategy, strategy.init(SMALL.start), HIGHEST_RANK, PLAN, "personal", 1)
    runner.run(SMALL.model, job)
    runner.evaluate(SMALL.model, job)
    found = peft_files.load_adapter(SMALL.config, SMALL.schema, tmp_path / "personal-adapter")
    torch.testing.assert_close(SMALL.logits_of(found), SMALL.logits())


@pytest.mark.parametrize("tells", [True, False])
def test_who_tells_no_scores_does_not_tell_that_it_failed(
    tells: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    nothing = replace(SMALL.clients[0], train_rows=[])
    runner = JobRunner(0, nothing, tmp_path, ClientPolicy(metrics=tells))
    strategy = load("fedavg")
    job = stage_job(strategy, strategy.init(SMALL.start), HIGHEST_RANK, PLAN, "personal", 1)
    if tells:
        with pytest.raises(ClientFailed, match="has no examples"):
            runner.run(SMALL.model, job)
        return
    assert runner.run(SMALL.model, job) and "failed" in caplog.text
    assert not ClientState(tmp_path, "personal").of(1)
