"""Rounds and asynchronous runs on a simulated clock."""

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fedlora import simulate
from fedlora.errors import RoundFailed
from fedlora.jobs import Client, Job, PrivacyTerms, Update
from fedlora.run.plan import Plan, RoundResult
from fedlora.sections import Policy, Training
from fedlora.server.rounds import fit
from fedlora.simulations.client_traces import ClientTrace, ListedTimes
from fedlora.simulations.clock import ClockedFleet, work
from fedlora.strategies.fedavg import FedAvg
from tests.server.test_rounds import Few
from tests.support.adapters import factors, fresh
from tests.support.forked import FORKS, preload
from tests.support.small_run import UNLIKE, begin, outcome, resume, site

preload("tests.simulations.test_clock")
STEP = Training(batch_size=1, steps=1)  # of one example: at speed v it takes 1 / v seconds


def run(traces: list[ClientTrace], rounds: int = 1, **policy: Any) -> list[RoundResult]:
    plan = Plan(rounds, len(traces), training=STEP, policy=Policy(**policy))
    return list(fit(FedAvg(), ClockedFleet(Few(len(traces)), traces, 0, plan.policy), fresh(), plan))


def at(*speeds: float) -> list[ClientTrace]:
    return [ClientTrace(speed) for speed in speeds]


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    assert [done.record()["clock"] for done in run(at(1, 0.1, 0.5), rounds=2)] == [10.0, 20.0]


def test_who_is_slower_than_the_deadline_has_failed_its_round() -> None:
    done = run(at(1, 0.1, 0.5), deadline=5.0)[0]
    assert {i: failure.reason for i, failure in done.failed.items()} == {1: "no answer after 5 s"}
    assert done.clock == 5.0


def test_a_quorum_gives_the_others_its_grace() -> None:
    done = run(at(1, 0.1, 0.5, 0.25), quorum=0.5, grace=2.5)[0]
    assert sorted(done.failed) == [1] and done.clock == 4.5


def test_without_a_quorum_in_time_a_round_fails_as_it_does_elsewhere() -> None:
    with pytest.raises(RoundFailed, match=r"1 of 3 clients answered.*client 1: no answer after 1.5 s"):
        run(at(1, 0.1, 0.5), deadline=1.5)


def test_who_is_away_answers_when_it_is_back() -> None:
    away = ClientTrace(1.0, presence=ListedTimes(((100, 200),), 200.0))
    assert run([*at(1), away])[0].clock == 101.0
    assert sorted(run([*at(1), away], deadline=50.0, quorum=0.5)[0].failed) == [1]


def test_a_lost_client_gives_no_answer_and_another_one_in_another_round() -> None:
    rounds = run([ClientTrace(dropout=0.5)] * 8, rounds=6, quorum=0.01)
    lost = [sorted(done.failed) for done in rounds]
    assert lost == [sorted(done.failed) for done in run([ClientTrace(dropout=0.5)] * 8, rounds=6, quorum=0.01)]
    assert 0.25 < sum(map(len, lost)) / 48 < 0.75 and len({tuple(clients) for clients in lost}) > 3


def test_what_clients_do_for_their_own_use_takes_no_time_and_loses_nobody() -> None:
    fleet = ClockedFleet(Few(2), [ClientTrace(0.1, dropout=0.99)] * 2, 0, Policy(deadline=1.0))
    answers = dict(fleet.train({i: Job(factors(0), stage="personal") for i in range(2)}))
    assert all(isinstance(answer, Update) for answer in answers.values()) and fleet.now == 0


def test_the_work_of_a_job_is_the_examples_that_it_goes_through() -> None:
    client, start = Client(0, examples=40, rank=4, records=30), factors(0)
    terms = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.1, steps=7, delta=1e-5, engine="auto")
    assert work(Job(start, training=Training(epochs=1.5)), client) == 60
    assert work(Job(start, training=Training(steps=3, batch_size=8, accumulate=2)), client) == 48
    assert work(Job(start, training=Training(steps=3, batch_size=99)), client) == 120
    assert work(Job(start, privacy=terms), client) == pytest.approx(21)
    assert work(Job(start, trains=""), client) == 0


ASYNC: dict[str, Any] = {"server": {"mode": "async", "buffer": 1, "fair": True}, "simulation": {"speed": "1,3.7"}}


def test_a_killed_asynchronous_run_goes_on_to_the_same_end_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 after two versions; clients keep B, and their rounding errors."""
    place = site(tmp_path)
    whole = begin(place, tmp_path / "whole", rounds=6, **ASYNC)
    killed = FORKS.Process(target=_killed, args=(place, tmp_path / "killed"))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "killed" / "adapter").exists()
    ended, gone_on = resume(whole, 6), resume(tmp_path / "killed", 6)
    assert outcome(gone_on) == outcome(ended)
    ages = [age for record in ended.rounds for _, age in record["arrivals"]]
    assert max(ages) > 0 and ended.rounds[-1]["clock"] > 0


def _killed(place: Path, out: Path) -> None:
    """Begin the same run, and end it at its third buffer: what clients keep is written, the version is not."""
    from fedlora.server import asynchronous

    next_state, calls = asynchronous.next_state, count(1)

    def counted(*words: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return next_state(*words)

    asynchronous.next_state = counted
    begin(place, out, rounds=6, **ASYNC)


def test_an_asynchronous_run_of_clients_that_are_alike_is_the_run_of_rounds(tmp_path: Path) -> None:
    place = site(tmp_path)
    rounds = simulate(resume=begin(place, tmp_path / "rounds", strategy="fedavg"), progress=False)
    alike = {"server": {"mode": "async", "buffer": 2}}
    buffered = simulate(resume=begin(place, tmp_path / "async", strategy="fedavg", **alike), progress=False)
    (left, _), (right, records) = outcome(rounds), outcome(buffered)
    assert left == right and all(set(record) - set(UNLIKE) >= {"clock", "arrivals"} for record in records)
