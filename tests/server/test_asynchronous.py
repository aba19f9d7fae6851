"""Asynchronous rounds: what an older update counts, whose turn it is, and how a run goes on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.errors import Failure, RoundFailed
from fedlora.jobs import PrivacySpent
from fedlora.lora import LoRA, average, map_factors
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.plan import Plan, ResumePoint, RoundResult
from fedlora.sections import Policy, PrivacyConfig, Training
from fedlora.server.asynchronous import fit_asynchronously, rebased
from fedlora.server.rounds import fit
from fedlora.simulations.client_traces import ClientTrace
from fedlora.simulations.clock import ClockedFleet
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategy import Client, Job, Update, load
from tests.server.test_rounds import Few
from tests.support.adapters import factors, fresh


@dataclass
class Pulled(Few):
    """Clients that go half of the way to a target of their own; a training of one example takes a second at speed 1."""

    targets: Sequence[float] = (0.0, 1.0)
    told: Mapping[int, PrivacySpent] = field(default_factory=dict)

    def clients(self) -> Sequence[Client]:
        return [Client(i, 10, 4, records=100) for i in range(len(self.targets))]

    def _one(self, i: int, job: Job) -> Update | Failure:
        if job.round >= self.deaf.get(i, job.rounds):
            return Failure("the line is dead")
        sides = {s: {m: t + 0.5 * (self.targets[i] - t) for m, t in job.start.side(s).items()} for s in job.shares}
        spent = PrivacySpent(epsilon=0.1, charges=job.round + 1) if job.privacy else None
        return Update(LoRA(**sides), 10, None if job.privacy else float(i), spent)


def plan(rounds: int, cohort: int, buffer: int, **more: Any) -> Plan:
    training = Training(batch_size=10, steps=1)
    policy = {key: more.pop(key) for key in [*more] if key in Policy.__dataclass_fields__}
    return Plan(rounds, cohort, training=training, buffer=buffer, policy=Policy(mode="async", **policy), **more)


def run(
    fleet: Few,
    plan: Plan,
    speeds: Sequence[float] = (),
    past: ResumePoint | None = None,
    strategy: Any = FedAvg(),  # noqa: B008
) -> list[RoundResult]:
    speeds = speeds or [1.0] * len(fleet.clients())
    clocked = ClockedFleet(fleet, [ClientTrace(speed) for speed in speeds], 0, plan.policy)
    return list(fit_asynchronously(strategy, clocked, fresh(), plan, past))


@settings(max_examples=10, deadline=None)
@given(ages=st.lists(st.integers(0, 10), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_mean_of_rebased_updates_is_the_step_of_fedbuff(ages: list[int], seed: int) -> None:
    now, weights = factors(seed), [1.0 + i for i in range(len(ages))]
    pairs = [(factors(seed + 10 * i + 1), factors(seed + 10 * i + 2)) for i in range(len(ages))]
    shares = [(1 + age) ** -0.5 for age in ages]
    moved = [rebased(u, start, now, share) for (u, start), share in zip(pairs, shares, strict=True)]

    def step(x: torch.Tensor, *changed: torch.Tensor) -> torch.Tensor:
        us, starts = changed[::2], changed[1::2]
        terms = zip(weights, shares, us, starts, strict=True)
        return x + sum((w * s * (u - start) for w, s, u, start in terms), torch.zeros_like(x)) / sum(weights)

    expected = map_factors(step, now, *(lora for pair in pairs for lora in pair))
    for side, module, mean in average(moved, weights).matrices():
        assert_close(mean, expected.side(side)[module], rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "fed_sb", "fslora", "hetlora"])
@pytest.mark.parametrize("fair", [False, True])
def test_where_all_are_fresh_it_is_the_round_of_all_bit_for_bit(strategy: str, fair: bool) -> None:
    options = {"weighting": "examples"} if strategy == "hetlora" else {}
    fleet, asked = Pulled(targets=(0, 1, 3)), plan(4, 3, 3, fair=fair)
    buffered = run(fleet, asked, strategy=load(strategy, **options))
    rounds = list(fit(load(strategy, **options), fleet, fresh(), asked))
    for one, other in zip(buffered, rounds, strict=True):
        left, right = (load(strategy, **options).adapter(done.state) for done in (one, other))
        assert all(torch.equal(t, right.side(s)[m]) for s, m, t in left.matrices())
    assert [age for done in buffered for _, age in done.arrivals] == [0] * 12


def test_an_older_update_moves_the_model_of_now_by_its_share_of_its_change() -> None:
    """Client 1 is quicker: the first update of client 0 is of version 0, and comes after two of client 1."""
    first, second, third = run(Pulled(), plan(3, 2, 1), speeds=[0.4, 1.0])
    assert [done.arrivals for done in (first, second, third)] == [((1, 0),), ((1, 0),), ((0, 2),)]
    assert [done.clock for done in (first, second, third)] == [10.0, 20.0, 25.0]
    start = fresh().A["q"]
    x1 = start + 0.5 * (1 - start)
    x2 = x1 + 0.5 * (1 - x1)
    assert_close(second.state.A["q"], x2)
    assert_close(third.state.A["q"], x2 + 3**-0.5 * 0.5 * (0 - start))


def test_an_update_that_is_too_old_is_refused_and_its_client_gets_the_newest_version() -> None:
    rounds = run(Pulled(), plan(9, 2, 1, max_staleness=2), speeds=[0.21, 1.0])
    late = next(done for done in rounds if 0 in done.failed)
    assert late.failed[0].reason == "its update is 4 versions old; server.max_staleness = 2"
    assert late.record()["failed"] == {"0": late.failed[0].reason} and late.arrivals[0] == (0, 4)
    in_flight = next(done.in_flight for done in rounds[late.number :] if done.in_flight)
    assert [job.version for job in in_flight.jobs if job.client == 0] == [late.number]


def test_a_client_has_one_update_in_a_buffer_and_is_at_a_version_once() -> None:
    fleet = Pulled(targets=(0, 1, 2, 3, 4))
    rounds = run(fleet, plan(12, 2, 3), speeds=[1, 2, 4, 8, 16])
    assert all(len({i for i, _ in done.arrivals}) == 3 for done in rounds)
    trained = Counter((i, done.number - 1 - age) for done in rounds for i, age in done.arrivals)
    assert set(trained.values()) == {1}
    assert max(len(done.in_flight.jobs) for done in rounds if done.in_flight) <= 2


def test_a_run_that_is_broken_off_after_any_version_goes_on_to_the_same_end() -> None:
    asked, speeds = plan(8, 4, 2, fair=True), [1.0, 1.7, 3.1, 9.0, 2.2]
    whole = run(Pulled(targets=(0, 1, 2, 3, 4)), asked, speeds)
    for at in whole[:-1]:
        past = ResumePoint(at.number, at.state, clock=at.clock or 0.0, in_flight=at.in_flight)
        rest = run(Pulled(targets=(0, 1, 2, 3, 4)), asked, speeds, past)
        assert [done.record()["arrivals"] for done in rest] == [d.record()["arrivals"] for d in whole[at.number :]]
        assert torch.equal(rest[-1].state.A["q"], whole[-1].state.A["q"]) and rest[-1].clock == whole[-1].clock


def test_clients_that_fail_have_had_their_turn_and_the_version_goes_on_without_them() -> None:
    rounds = run(Pulled(targets=(0, 1, 2), deaf={0: 1}), plan(4, 3, 2))
    assert [sorted(done.failed) for done in rounds] == [[], [0], [0], [0]]
    assert all(len(done.arrivals) - len(done.failed) == 2 for done in rounds)


def test_a_version_for_which_nobody_has_an_update_ends_the_run_or_is_the_one_before() -> None:
    deaf = {0: 1, 1: 1}
    with pytest.raises(RoundFailed, match=r"version 3: no client has an update for it \(client 0: the line is dead"):
        run(Pulled(deaf=deaf), plan(3, 2, 1))
    first, second, third = run(Pulled(deaf=deaf), plan(3, 2, 2, below_quorum="skip"))
    assert second.skipped and third.state is first.state and second.train_loss is None


def test_an_update_that_goes_too_far_takes_no_place_in_a_buffer_and_ends_no_run() -> None:
    """With a buffer of one, its client alone made a version without an update."""
    rounds = run(Pulled(targets=(0.0, 1e6), deaf={}), plan(4, 2, 1, largest_step=100.0), speeds=[1.0, 2.0])
    assert all("server.largest_step = 100" in done.failed[1].reason for done in rounds if 1 in done.failed)
    assert {i for done in rounds for i in done.failed} == {1}
    assert [sum(i == 0 for i, _ in done.arrivals) for done in rounds] == [1, 1, 1, 1]


def test_a_fair_run_of_clients_that_are_alike_steps_as_far_as_one_that_is_not() -> None:
    """From the first version on, where nobody's rate of arrival is known."""
    fleet, asked = Pulled(targets=[1.0] * 10), {"cohort": 2, "buffer": 2, "staleness": 0.0}
    plain, fair = (run(fleet, plan(15, **asked, fair=fair)) for fair in (False, True))
    assert torch.equal(plain[0].state.A["q"], fair[0].state.A["q"])
    left = [[float((1 - done.state.A["q"]).norm()) for done in rounds] for rounds in (plain, fair)]
    assert left[1][-1] < 3 * left[0][-1]


DP = RecordLevelDP(config=PrivacyConfig(noise=1.0, joins=1), training=Training(batch_size=10, steps=1), rounds=6)


def test_a_job_that_is_sent_counts_as_charged_and_a_client_stops_at_its_joins() -> None:
    """Used, refused and under way alike: its client charges its ledger before it trains."""
    fleet = Pulled(targets=(0, 1, 2, 3))
    rounds = run(fleet, plan(2, 4, 2, record_level=DP, metrics=False), speeds=[1, 1, 2, 3])
    joined = Counter(i for done in rounds for i in done.charged)
    assert max(joined.values()) == 1 and sum(joined.values()) == len({(i, v) for i, v in _sent(rounds)})
    assert all(set(done.record()["spent"]) == {str(i) for i in done.charged} for done in rounds if done.charged)
    with pytest.raises(RoundFailed, match=r"every client has joined dp.joins = 1 versions"):
        run(fleet, plan(3, 4, 2, record_level=DP, metrics=False), speeds=[1, 1, 2, 3])


def _sent(rounds: Sequence[RoundResult]) -> list[tuple[int, int]]:
    """Client and version of every job that was sent: those that arrived, and those that are under way at the end."""
    arrived = [(i, done.number - 1 - age) for done in rounds for i, age in done.arrivals]
    last = rounds[-1].in_flight
    return arrived + [(job.client, job.version) for job in (last.jobs if last else ())]
