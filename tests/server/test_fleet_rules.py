"""How long a round waits: for a quorum as long as it may, for the others as long as answers take."""

import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import pytest
from flwr.app import Message, MessageType

from fedlora.errors import Failure, FailureKind
from fedlora.sections import Policy
from fedlora.server import fleet_rules
from fedlora.server.fleet import FlowerFleet
from fedlora.server.fleet_rules import LONGEST, SHORTEST, AnswerClock, AnswerTimes, rules_of
from fedlora.strategy import Update
from tests.server.test_fleet import Threads, echo, jobs

INF = float("inf")


class Losing(Threads):
    """Client 0's first job reaches nobody; with `back`, its node was killed, and started anew before it was missed."""

    def __init__(self, *apps: object, back: bool) -> None:
        super().__init__(*apps)  # type: ignore[arg-type]
        self._back, self.jobs = back, 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        for m in messages:
            if m.metadata.message_type == MessageType.TRAIN and m.metadata.dst_node_id == 100:
                self.jobs += 1
                self.activated[100] = "later" if self._back else ""
                if self.jobs == 1:
                    self._replies[m.metadata.message_id] = Future()
        return ids


def with_times(seconds: list[float]) -> AnswerTimes:
    times = AnswerTimes()
    for s in seconds:
        times.add(s)
    return times


def test_a_silent_client_holds_nobody_once_a_quorum_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_rules, "SHORTEST", 1.5)
    fleet = FlowerFleet(Losing(*[echo(tmp_path)] * 3, back=False), rules_of(Policy(), 3))
    fleet.clients()
    answers = dict(fleet.train(jobs(3)))
    silent = answers.pop(0)
    assert isinstance(silent, Failure) and silent.kind == FailureKind.LATE and "no answer after" in silent.reason
    assert all(isinstance(answer, Update) for answer in answers.values()) and len(answers) == 2


def test_without_a_quorum_the_others_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_rules, "SHORTEST", 0.1)
    slow = echo(tmp_path, lambda i: time.sleep(2.0 if i else 0))
    fleet = FlowerFleet(Threads(slow, slow, slow), rules_of(Policy(quorum=1.0), 3))
    fleet.clients()
    assert all(isinstance(answer, Update) for answer in dict(fleet.train(jobs(3))).values())


def test_a_node_that_was_killed_and_is_back_before_it_was_missed_is_sent_its_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.server.fleet.LOOK_AT_NODES", 0.2)
    grid = Losing(*[echo(tmp_path)] * 3, back=True)
    fleet = FlowerFleet(grid, rules_of(Policy(deadline=60.0), 3))
    fleet.clients()
    assert all(isinstance(answer, Update) for answer in dict(fleet.train(jobs(3))).values())
    assert grid.jobs == 2


def test_a_deadline_that_is_set_is_the_deadline() -> None:
    clock = AnswerClock(rules_of(Policy(deadline=50.0), 3), with_times([1.0]), asked=3)
    for _ in range(3):
        clock.answered()
    assert clock.limit() == 50.0
    never = AnswerClock(rules_of(Policy(deadline=INF), 3), with_times([1.0]), asked=3, answered=3)
    assert never.limit() == INF and not never.is_over()


def test_by_default_others_have_ten_times_as_long_as_the_median_answer_and_ten_minutes_at_least() -> None:
    rules = rules_of(Policy(), 5)
    assert AnswerClock(rules, AnswerTimes(), asked=5).limit() == LONGEST
    assert AnswerClock(rules, with_times([3.0] * 9), asked=5, answered=3).limit() == SHORTEST
    assert AnswerClock(rules, with_times([100.0] * 9), asked=5, answered=3).limit() == 1000.0
    assert AnswerClock(rules, with_times([100.0] * 9), asked=5, answered=2).limit() == LONGEST


def test_a_minority_of_slow_or_quick_answers_moves_no_deadline() -> None:
    rules = rules_of(Policy(), 5)
    for odd in (0.0, 1e5):
        times = with_times([100.0] * 5 + [odd] * 4)
        assert AnswerClock(rules, times, asked=5, answered=5).limit() == 1000.0


def test_a_round_that_may_be_skipped_waits_for_no_quorum() -> None:
    rules = rules_of(Policy(below_quorum="skip"), 5)
    assert AnswerClock(rules, with_times([100.0]), asked=5).limit() == 1000.0


def test_a_grace_ends_the_wait_sooner() -> None:
    rules = rules_of(Policy(grace=7.0), 4)
    assert 7.0 <= AnswerClock(rules, AnswerTimes(), asked=4, answered=2).limit() < 8.0
    assert AnswerClock(rules, AnswerTimes(), asked=4, answered=1).limit() == LONGEST


def test_under_secure_aggregation_a_quorum_is_what_a_sum_needs() -> None:
    assert rules_of(Policy(quorum=0.5), 10, threshold=0.8).enough == 0.8
