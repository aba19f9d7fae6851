"""Rounds of two passes over their clients: who drops out between them, what is charged, and a run killed there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from fedlora.checks.small_models import RANK
from fedlora.checks.verdict import identical
from fedlora.config import build
from fedlora.errors import Failure, FailureKind, PrivacyError, RoundFailed, StrategyError
from fedlora.jobs import Job, Update, is_projected, shared_part
from fedlora.lora import LoRA, average, delta, join, norm, scale
from fedlora.privacy.client_level import ClientLevelDP
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.compose import compose
from fedlora.run.plan import ResumePoint, job_for
from fedlora.run.sides import sides
from fedlora.sections import MessageConfig, Policy, PrivacyConfig, Training
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit
from fedlora.strategies.fedask import FedASK
from fedlora.strategies.head import Head
from fedlora.strategy import Client
from tests.server.test_secure_aggregation import PLAN as SGD_PLAN
from tests.server.test_secure_aggregation import SECURE, SGD, START, Line, apart, line, run

ASK = FedASK()
WIDE = FedASK(width=10 * RANK)  # as wide as the mean can be of rank
PLAN = replace(SGD_PLAN, training=Training(lr=1e-2, steps=2, batch_size=4))  # SGD hardly moves so small a model


@dataclass
class Leaves(Line):
    """Clients of which some are not heard from in a second pass."""

    away: tuple[int, ...] = ()

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        for i, answer in super().train(jobs):
            yield i, Failure("its line is dead") if jobs[i].left and i in self.away else answer


def leaves(folder: Path, clients: int, *away: int) -> Leaves:
    return Leaves(line(folder, (RANK,) * clients).fleet, away=away)


def off(one: LoRA, other: LoRA) -> float:
    """How far two products are apart, over the size of one."""
    return norm(join(one, scale(other, -1))) / norm(other)


def test_a_second_pass_trains_nothing_and_is_of_the_same_clients(tmp_path: Path) -> None:
    fleet = line(tmp_path, train=2)
    done = run(fleet, PLAN, ASK)[0]
    updates = [h for h in fleet.heard if isinstance(h, Update)]
    assert len(updates) == 9 and set(done.failed) == {2}  # the five, and those four that were heard
    assert [bool(u.lora.B) for u in updates] == [True] * 5 + [False] * 4
    assert all(u.loss is None and u.lora.A and not u.lora.H for u in updates[5:])
    assert done.train_loss is not None and not done.state.between and done.state.round == 1


def test_with_a_wide_sketch_the_model_is_the_mean_of_the_clients_models(tmp_path: Path) -> None:
    fleet, plain = line(tmp_path / "a"), line(tmp_path / "b")
    done = run(fleet, PLAN, WIDE)[0]
    jobs = {c.id: replace(Job(START), training=PLAN.training) for c in plain.clients()}
    updates = [(u.lora, float(u.examples)) for _, u in plain.train(jobs) if isinstance(u, Update)]
    wanted = [(w / sum(w for _, w in updates), delta(u)) for u, w in updates]
    found = delta(WIDE.adapter(done.state))
    for m, product in found.items():
        assert torch.allclose(product, sum(p * d[m] for p, d in wanted), atol=1e-6)  # type: ignore[arg-type]
    assert apart(LoRA(H=done.state.lora.H), average([u.only("H") for u, _ in updates], [w for _, w in updates])) < 1e-6


def test_who_drops_out_between_the_passes_is_left_out_of_the_mean(tmp_path: Path) -> None:
    done = run(leaves(tmp_path / "a", 5, 2), PLAN, WIDE)[0]
    without = run(line(tmp_path / "b", train=2), PLAN, WIDE)[0]
    assert set(done.failed) == {2} and off(WIDE.adapter(done.state), WIDE.adapter(without.state)) < 1e-4


def test_too_few_in_the_second_pass_leave_the_state_as_it_was(tmp_path: Path) -> None:
    skip = replace(PLAN, rounds=2, policy=Policy(quorum=0.5, below_quorum="skip"))
    fleet = leaves(tmp_path / "a", 5, 0, 1, 2)
    rounds = fit(ASK, fleet, START, skip)
    first = next(rounds)
    assert first.skipped and identical(first.state, ASK.init(START)) and set(first.failed) == {0, 1, 2}
    fleet.away = ()
    assert not next(rounds).skipped
    with pytest.raises(RoundFailed, match=r"round 1: 2 of 5 clients answered, server.quorum = 0.5"):
        run(leaves(tmp_path / "b", 5, 0, 1, 2), replace(PLAN, policy=Policy(quorum=0.5)), ASK)


def test_masked_a_single_client_that_drops_out_between_the_passes_costs_the_round_and_not_the_run(
    tmp_path: Path,
) -> None:
    fleet = leaves(tmp_path, 7, 3)
    plan = replace(PLAN, rounds=2, cohort=7, secure=SECURE, policy=Policy(quorum=0.5))
    rounds = fit(ASK, fleet, START, plan)
    first = next(rounds)
    assert first.skipped and identical(first.state, ASK.init(START))
    assert "members [3] are in the round's first sum and not in its second" in first.failed[0].reason
    assert {f.kind for i, f in first.failed.items() if i != 3} == {FailureKind.MASKED}
    fleet.away = ()
    assert not next(rounds).skipped


def test_masked_as_many_as_a_sum_must_have_may_drop_out_between_the_passes(tmp_path: Path) -> None:
    plan = replace(PLAN, cohort=9, policy=Policy(quorum=0.5))
    secure = run(leaves(tmp_path / "a", 9, 0, 4, 5), replace(plan, secure=SECURE), WIDE)[0]
    plain = run(leaves(tmp_path / "b", 9, 0, 4, 5), plan, WIDE)[0]
    assert set(secure.failed) == {0, 4, 5} and not secure.skipped
    assert off(*(WIDE.adapter(done.state) for done in (secure, plain))) < 1e-3


def test_a_run_killed_between_the_passes_takes_the_round_again(tmp_path: Path) -> None:
    class Killed(Line):
        def train(self, jobs: Mapping[int, Job]) -> Answers:
            if any(job.left and job.round == 1 for job in jobs.values()):
                raise KeyboardInterrupt
            return super().train(jobs)

    plan = replace(PLAN, rounds=2)
    whole = run(line(tmp_path / "whole"), plan, ASK)
    fleet = Killed(line(tmp_path / "killed").fleet)
    rounds = fit(ASK, fleet, START, plan)
    past = next(rounds)
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    again = next(fit(ASK, line(tmp_path / "killed"), START, plan, ResumePoint(1, past.state)))
    assert identical(again.state, whole[1].state)


def test_a_round_is_charged_once(tmp_path: Path) -> None:
    dp = PrivacyConfig(noise=1.0, delta=1e-3, rate=0.5, seeded=True)
    plan = replace(SGD_PLAN, rounds=2, record_level=RecordLevelDP(config=dp, training=SGD, rounds=2), metrics=False)
    done = run(line(tmp_path), plan, ASK)
    assert {s.charges for s in done[-1].spent.values()} == {2} and len(done[-1].spent) == 5
    assert norm(ASK.adapter(done[-1].state)) > 0


def test_a_private_round_taken_again_is_not_charged_again(tmp_path: Path) -> None:
    """As after a server that was killed between the passes, or behind the second one."""
    dp = PrivacyConfig(noise=1.0, delta=1e-3, rate=0.5)
    plan = replace(SGD_PLAN, record_level=RecordLevelDP(config=dp, training=SGD, rounds=1), metrics=False)
    one, again = (run(line(tmp_path), plan, ASK)[0] for _ in range(2))
    assert one.spent == again.spent and apart(one.state.lora, again.state.lora) == 0


def test_a_local_head_stays_with_its_client_and_a_frozen_one_as_it_was(tmp_path: Path) -> None:
    for policy in ("local", "frozen"):
        done = run(line(tmp_path / policy), replace(PLAN, rounds=2), Head(ASK, policy))[-1]  # type: ignore[arg-type]
        assert identical(done.state.lora.only("H"), START.only("H")) and norm(ASK.adapter(done.state)) > 0


def test_a_projection_travels_as_it_is_whatever_the_run_compresses() -> None:
    plan = replace(PLAN, messages=MessageConfig(up="int8"))
    job = job_for(ASK, ASK.init(START), Client(0, 1, RANK), plan, 0)
    assert job.upload == "float32" and is_projected(job) and job.metrics


def test_where_a_mechanism_is_of_one_release_a_round_it_is_refused(tmp_path: Path) -> None:
    hidden = ClientLevelDP(noise=0.3, rate=1.0, population=5, delta=1e-2, clip=0.01)
    with pytest.raises(PrivacyError, match="asks for projections of a product"):
        run(line(tmp_path), replace(PLAN, client_level=hidden, metrics=False), ASK)
    config = build({"strategy": "fedask", "dp.level": "client", "dp.epsilon": 3.0, "clients": 5})
    with pytest.raises(PrivacyError, match="FedASK has two sums a round of projections of a product"):
        compose(config, START)


def test_a_job_that_asks_for_what_cannot_be_projected_is_refused() -> None:
    class Asks(FedASK):
        def client_init(self, state: object, client: Client) -> Job:
            return Job(START, shares="BH", right=START.A)

    with pytest.raises(StrategyError, match=r"strategy Asks gives client 0 a job that cannot be done: right is \(d_in"):
        run(line(Path("unused")), PLAN, Asks())


def test_what_clients_are_told_that_they_will_be_asked_for_are_both_factors() -> None:
    assert sides(ASK) == ("ABH", "ABH")


def test_the_part_of_a_job_without_projections_are_its_shared_sides() -> None:
    assert identical(shared_part(Job(START, shares="A"), START), START.only("A"))
