"""A client's ledger: charged before, never twice for one thing, and never quietly lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedlora.client.ledger import Ledger
from fedlora.data.client_data import fingerprint
from fedlora.errors import LedgerError
from fedlora.jobs import Charge, PrivacyTerms
from fedlora.privacy.accounting import epsilon
from fedlora.strategy import Update
from tests.support.adapters import factors

TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.1, steps=10, delta=1e-5)
ONE = [Charge(noise=1.0, rate=0.1, steps=10)]
NONE = float("inf")


def update() -> Update:
    return Update(factors(1, dtype=torch.float32).only("AB"), 20, None)


def test_a_charge_is_on_the_disk_with_its_terms(tmp_path: Path) -> None:
    Ledger(tmp_path, "data").charge("job", TERMS, round=4, budget=NONE)
    line = json.loads((tmp_path / "ledger.jsonl").read_text())
    terms = {"kind": "charge", "job": "job", "round": 5, "noise": 1.0, "rate": 0.1, "steps": 10, "data": "data"}
    assert line.items() >= terms.items()
    assert Ledger(tmp_path, "data").spent(1e-5).epsilon == epsilon(ONE, delta=1e-5)


def test_a_job_that_never_got_done_is_not_charged_twice(tmp_path: Path) -> None:
    """It was killed before its answer was on the disk, so nothing left."""
    for _ in range(3):
        Ledger(tmp_path, "data").charge("job", TERMS, round=0, budget=NONE)
    assert Ledger(tmp_path, "data").charges() == ONE


def test_a_job_that_was_done_has_the_same_answer_and_no_new_charge(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "data")
    ledger.charge("job", TERMS, round=0, budget=NONE)
    ledger.keep("job", update())
    again = Ledger(tmp_path, "data")
    again.charge("job", TERMS, round=0, budget=NONE)
    answer = again.answer("job")
    assert answer is not None and answer.examples == 20 and answer.loss is None and again.charges() == ONE
    assert_close(vars(answer.lora), vars(update().lora), rtol=1e-6, atol=1e-6)


def test_an_answer_that_is_lost_may_have_been_sent_and_is_paid_for_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "data")
    ledger.charge("job", TERMS, round=0, budget=NONE)
    ledger.keep("job", update())
    (tmp_path / "answer.safetensors").unlink()
    assert ledger.answer("job") is None
    ledger.charge("job", TERMS, round=0, budget=NONE)
    assert ledger.charges() == 2 * ONE


def test_another_job_is_another_charge(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "data")
    for job in ("one", "two"):
        ledger.charge(job, TERMS, round=0, budget=NONE)
        ledger.keep(job, update())
    assert ledger.spent(1e-5).charges == 2 and ledger.answer("one") is None


def test_what_would_pass_the_budget_is_refused_and_not_charged(tmp_path: Path) -> None:
    ledger, twice = Ledger(tmp_path, "data"), epsilon(2 * ONE, delta=1e-5)
    ledger.charge("one", TERMS, round=0, budget=twice)
    ledger.charge("two", TERMS, round=1, budget=twice)
    with pytest.raises(LedgerError, match=r"privacy budget is spent: epsilon is .* with this round, and dp.budget"):
        ledger.charge("three", TERMS, round=2, budget=twice)
    assert ledger.charges() == 2 * ONE


def test_charges_of_runs_before_count(tmp_path: Path) -> None:
    """One ledger for all runs on the same data: a new run does not begin at zero."""
    Ledger(tmp_path, "data").charge("first run", TERMS, round=0, budget=NONE)
    with pytest.raises(LedgerError, match="budget is spent"):
        Ledger(tmp_path, "data").charge("second run", TERMS, round=0, budget=epsilon(ONE, delta=1e-5) * 1.01)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text.replace('"steps": 10', '"steps": 1'), "was altered"),
        (lambda text: text[: text.index("\n") + 1], "was altered"),
        (lambda text: "", "was altered"),
        (lambda text: "\n".join(reversed(text.splitlines())) + "\n", "was altered"),
    ],
)
def test_an_altered_ledger_is_a_refusal(tmp_path: Path, spoil: object, says: str) -> None:
    ledger = Ledger(tmp_path, "data")
    for job in ("one", "two"):
        ledger.charge(job, TERMS, round=0, budget=NONE)
    path = tmp_path / "ledger.jsonl"
    path.write_text(spoil(path.read_text()))  # type: ignore[operator]
    with pytest.raises(LedgerError, match=says):
        ledger.charge("three", TERMS, round=0, budget=NONE)


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.head"])
def test_a_missing_file_is_a_refusal(tmp_path: Path, name: str) -> None:
    ledger = Ledger(tmp_path, "data")
    ledger.charge("one", TERMS, round=0, budget=NONE)
    (tmp_path / name).unlink()
    with pytest.raises(LedgerError, match=f"{name} is missing"):
        ledger.charge("two", TERMS, round=1, budget=NONE)


def test_a_ledger_that_is_gone_altogether_is_missed_by_what_the_server_has_seen(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="it holds 0 charges, and the server has had 2 answers from this client"):
        Ledger(tmp_path, "data").charge("job", replace(TERMS, known=2), round=2, budget=NONE)
    assert not list(tmp_path.iterdir())


def test_a_ledger_of_other_data_is_a_refusal(tmp_path: Path) -> None:
    Ledger(tmp_path, "data").charge("one", TERMS, round=0, budget=NONE)
    with pytest.raises(LedgerError, match="is of another data set"):
        Ledger(tmp_path, "other").charge("two", TERMS, round=0, budget=NONE)


def test_what_a_crash_left_of_a_line_is_no_charge(tmp_path: Path) -> None:
    """A line that its head does not count yet: nothing had begun."""
    ledger = Ledger(tmp_path, "data")
    ledger.charge("one", TERMS, round=0, budget=NONE)
    for torn in ('{"kind": "char', '{"kind": "charge", "job": "two", "noise": 1.0, "rate": 0.1, "steps": 10}\n'):
        with (tmp_path / "ledger.jsonl").open("a") as f:
            f.write(torn)
        assert ledger.charges() == ONE
    ledger.charge("two", TERMS, round=1, budget=NONE)
    assert Ledger(tmp_path, "data").charges() == 2 * ONE


def test_a_crash_between_the_first_line_and_its_head_is_survived(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "data")
    ledger.charge("one", TERMS, round=0, budget=NONE)
    (tmp_path / "ledger.head").write_text(f"0 {'0' * 64}\n")
    assert ledger.charges() == []
    ledger.charge("one", TERMS, round=0, budget=NONE)
    assert ledger.charges() == ONE


def test_a_fingerprint_tells_data_apart_and_not_their_order() -> None:
    rows = [{"text": f"row {i}", "label": i % 2, "id": i} for i in range(4)]
    columns = ("text", "label")
    assert fingerprint(rows, columns) == fingerprint(rows[::-1], columns)
    assert fingerprint(rows, columns) == fingerprint([{**row, "id": 9} for row in rows], columns)
    changed = [*rows[:3], {"text": "row 3", "label": 0, "id": 3}]
    assert len({fingerprint(r, columns) for r in (rows, rows[:3], changed, [*rows, rows[0]])}) == 4
