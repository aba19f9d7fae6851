"""Private rounds: who is charged, and who is left out."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fedlora.errors import Failure, FailureKind, PrivacyError, ReasonCode, RoundFailed
from fedlora.jobs import PrivacySpent
from fedlora.lora import LoRA
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.plan import Plan, RoundResult
from fedlora.sections import Policy, PrivacyConfig, Training
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategy import Client, Job, Update
from tests.server.test_rounds import Few
from tests.support.adapters import fresh

DP = RecordLevelDP(config=PrivacyConfig(noise=1.0), training=Training(batch_size=10, steps=4), rounds=2)
PLAN = Plan(2, 9, policy=Policy(quorum=0.1), record_level=DP, metrics=False)
ALONE = DP.epsilon_after(Client(0, 100, 4, records=100), rounds=1)


@dataclass
class Private(Few):
    """Clients of 100 records, or of as many as they say; each answers as its number says, or is charged and answers."""

    records: Mapping[int, int] = field(default_factory=dict)
    answers: Mapping[int, Any] = field(default_factory=dict)

    def clients(self) -> list[Client]:
        return [Client(i, 100, 4, records=self.records.get(i, 100)) for i in range(self.size)]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        self.jobs += jobs.values()
        for i, job in jobs.items():
            told = self.answers.get(i, PrivacySpent(epsilon=ALONE * (job.round + 1), charges=job.round + 1))
            yield i, told if isinstance(told, Failure) else Update(moved(job), 100, None, told)


def moved(job: Job) -> LoRA:
    return LoRA(**{s: {m: t + 0.1 for m, t in job.start.side(s).items()} for s in job.shares})


def run(fleet: Private, plan: Plan = PLAN) -> list[RoundResult]:
    return list(fit(FedAvg(), fleet, fresh(), plan))


@pytest.mark.parametrize(
    "failure",
    [
        Failure("an update's change has norm 1e9", FailureKind.REFUSED),
        Failure("no answer after 600 s", FailureKind.LATE),
        Failure("Node Unavailable", FailureKind.OFFLINE),
        Failure.told(ReasonCode.DIVERGED),
        Failure.told(ReasonCode.EGRESS),
    ],
    ids=lambda f: f.kind,
)
def test_a_client_whose_answer_is_refused_or_late_has_spent_and_taken_part_all_the_same(failure: Failure) -> None:
    one = replace(PLAN, record_level=replace(DP, config=PrivacyConfig(noise=1.0, joins=1)))
    fleet = Private(3, answers={2: failure})
    first = next(fit(FedAvg(), fleet, fresh(), one))
    assert first.spent[2].epsilon == pytest.approx(ALONE) and first.record()["spent"]["2"][1] == 0
    with pytest.raises(RoundFailed, match=r"every client has joined dp.joins = 1 rounds"):
        run(Private(3, answers={2: failure}), one)


def test_who_was_sent_no_job_or_refused_the_charge_has_spent_nothing() -> None:
    away = Failure("offline", FailureKind.OFFLINE, sent=False)
    refused = Failure.told(ReasonCode.BUDGET)
    done = run(Private(4, answers={2: away, 3: refused}))[-1]
    assert set(done.spent) == set(map(int, done.record()["spent"])) == {0, 1}


@pytest.mark.parametrize(
    "told", [None, PrivacySpent(epsilon=float("inf"), charges=1), PrivacySpent(epsilon=0.0, charges=0)]
)
def test_a_private_answer_that_does_not_say_what_it_spent_counts(told: PrivacySpent | None) -> None:
    class Untold(Private):
        def train(self, jobs: Mapping[int, Job]) -> Answers:
            for i, job in jobs.items():
                yield i, Update(moved(job), 100, None, told)

    first, second = run(Untold(2))
    assert first.spent[0].epsilon == pytest.approx(ALONE) and second.spent[0].epsilon > ALONE
    assert second.record()["epsilon"] == second.spent[0].epsilon


def test_no_client_is_told_of_charges_that_only_the_server_counted() -> None:
    """A ledger that has fewer than it is told of refuses for ever."""
    fleet = Private(2, answers={1: Failure("no answer", FailureKind.LATE)})
    run(fleet)
    known = [job.privacy.known for job in fleet.jobs if job.privacy]
    assert known == [0, 0, 1, 0]


def test_a_client_cannot_take_back_what_it_said_it_spent() -> None:
    class Less(Private):
        def train(self, jobs: Mapping[int, Job]) -> Answers:
            for i, job in jobs.items():
                yield i, Update(moved(job), 100, None, PrivacySpent(epsilon=3.0 - job.round, charges=1))

    assert run(Less(2))[-1].spent[0].epsilon == 3.0


@pytest.mark.parametrize("records", [0, 1, 9])
@pytest.mark.parametrize("config", [PrivacyConfig(noise=1.0), PrivacyConfig(epsilon=8.0, rate=0.05)])
def test_a_client_of_too_few_records_is_left_out_by_name_and_the_run_goes_on(
    records: int, config: PrivacyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(PLAN, record_level=replace(DP, config=config), evaluate_clients=True)
    with caplog.at_level(logging.WARNING, "fedlora"):
        done = run(Private(3, records={1: records}), plan)
    assert [r.asked for r in done] == [(0, 2), (0, 2)] and not done[-1].failed
    assert [m for m in caplog.messages if m.startswith("client 1 is left out: ")] == [caplog.messages[0]]


def test_a_client_whose_noise_cannot_be_computed_is_left_out_too() -> None:
    training = Training(batch_size=10, epochs=1.0)
    plan = replace(
        PLAN, record_level=RecordLevelDP(config=PrivacyConfig(noise=1.0, delta=1e-6), training=training, rounds=2)
    )
    done = run(Private(3, records={1: 10**12}), plan)
    assert done[0].asked == (0, 2)


def test_where_every_client_is_left_out_the_run_says_why() -> None:
    with pytest.raises(PrivacyError, match="more than the records of client 0, which has 3"):
        run(Private(1, records={0: 3}))
