"""What a run says before its start counts what its clients' ledgers hold already."""

import pytest

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.privacy_statement import final_epsilon, ledger_facts, refuse_spent_budgets
from fedlora.sections import PrivacyConfig, Training

DP = RecordLevelDP(
    config=PrivacyConfig(noise=1.0, rate=0.1, delta=1e-5, budget=3.0), training=Training(steps=5), rounds=4
)
CLIENTS = [Client(id=i, examples=100, rank=4, records=100) for i in range(3)]


def charges(rounds: int) -> list[Charge]:
    return [Charge(noise=1.0, rate=0.1, steps=5)] * rounds


def spent(rounds: int) -> float:
    return epsilon(charges(rounds), delta=1e-5)


def test_the_end_counts_the_runs_before() -> None:
    facts = ledger_facts(DP, CLIENTS, {0: charges(2), 1: charges(6)}, {})
    assert facts == {"ledgers": spent(6), "ledgers_end": spent(10)}
    record = {"smallest": {"epsilon": spent(4)}, "largest": {"epsilon": spent(4)}, **facts}
    assert final_epsilon({"record": record}) == spent(10)


def test_the_rounds_of_a_resumed_run_count_once() -> None:
    """Its ledgers hold them, and so does its plan."""
    assert ledger_facts(DP, CLIENTS, {0: charges(2)}, {0: 2}) == {}
    assert ledger_facts(DP, CLIENTS, {0: charges(3)}, {0: 2})["ledgers_end"] == spent(5)


def test_a_run_that_cannot_do_one_round_says_so() -> None:
    many = next(n for n in range(1, 100) if spent(n + 1) > 3.0)
    held = {i: charges(many) for i in range(2)}
    with pytest.raises(PrivacyError, match="no round can be done: the privacy budget is spent of 2 of 3 clients"):
        refuse_spent_budgets(DP, CLIENTS, held, needed=2)
    refuse_spent_budgets(DP, CLIENTS, held, needed=1)
    refuse_spent_budgets(DP, CLIENTS, {i: charges(many - 1) for i in range(3)}, needed=3)
