"""A client's ledger: charged before, never twice for one thing, and never quietly lost."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedlora.checks.small_models import small_model
from fedlora.client.ledger import Ledger
from fedlora.encoding.client_data import ClientData, fingerprint
from fedlora.errors import LedgerError, PrivacyError, PrivateJobFailed
from fedlora.jobs import Charge, PrivacyTerms
from fedlora.privacy.accounting import epsilon
from fedlora.storage.client_state import CachedReply
from fedlora.strategy import Update
from tests.support.adapters import factors

TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.1, steps=10, delta=1e-5)
ONE = [Charge(noise=1.0, rate=0.1, steps=10)]
NONE = float("inf")


ENCODER = small_model("gpt2").model.encoder


def opened(folder: Path, *texts: str, unit: str = "row", mark: Path | None = None, dealt: bool = False) -> Ledger:
    """The ledger in a folder, of records with these texts."""
    rows = [{"text": text} for text in texts or ("data",)]
    return Ledger(folder, ClientData(ENCODER, rows, unit=unit, dealt=dealt), mark)  # type: ignore[arg-type]


def update() -> Update:
    return Update(factors(1, dtype=torch.float32).only("AB"), 20, None)


def test_a_charge_is_on_the_disk_with_its_terms(tmp_path: Path) -> None:
    opened(tmp_path).charge("job", TERMS, round=4, budget=NONE)
    line = json.loads((tmp_path / "ledger.jsonl").read_text())
    terms = {"kind": "charge", "job": "job", "round": 5, "noise": 1.0, "rate": 0.1, "steps": 10}
    assert line.items() >= (terms | {"unit": "row", "delta": 1e-5, "records": 1}).items()
    assert opened(tmp_path).spent(1e-5).epsilon == epsilon(ONE, delta=1e-5)


def test_a_job_that_never_got_done_is_not_charged_twice(tmp_path: Path) -> None:
    """It was killed before its answer was on the disk, so nothing left."""
    for _ in range(3):
        opened(tmp_path).charge("job", TERMS, round=0, budget=NONE)
    assert opened(tmp_path).charges() == ONE


def test_a_job_that_was_done_has_the_same_answer_and_no_new_charge(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.charge("job", TERMS, round=0, budget=NONE)
    ledger.keep("job", update())
    again = opened(tmp_path)
    again.charge("job", TERMS, round=0, budget=NONE)
    answer = again.answer("job")
    assert answer is not None and answer.examples == 20 and answer.loss is None and again.charges() == ONE
    assert_close(vars(answer.lora), vars(update().lora), rtol=1e-6, atol=1e-6)


def test_an_answer_that_is_lost_may_have_been_sent_and_is_paid_for_again(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.charge("job", TERMS, round=0, budget=NONE)
    ledger.keep("job", update())
    (tmp_path / "answer.safetensors").unlink()
    assert ledger.answer("job") is None
    ledger.charge("job", TERMS, round=0, budget=NONE)
    assert ledger.charges() == 2 * ONE


def test_another_job_is_another_charge(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for job in ("one", "two"):
        ledger.charge(job, TERMS, round=0, budget=NONE)
        ledger.keep(job, update())
    assert ledger.spent(1e-5).charges == 2 and ledger.answer("one") is None


def test_what_would_pass_the_budget_is_refused_and_not_charged(tmp_path: Path) -> None:
    ledger, twice = opened(tmp_path), epsilon(2 * ONE, delta=1e-5)
    ledger.charge("one", TERMS, round=0, budget=twice)
    ledger.charge("two", TERMS, round=1, budget=twice)
    with pytest.raises(LedgerError, match=r"privacy budget is spent: epsilon is .* with this round, and dp.budget"):
        ledger.charge("three", TERMS, round=2, budget=twice)
    assert ledger.charges() == 2 * ONE


def test_charges_of_runs_before_count(tmp_path: Path) -> None:
    """One ledger for all runs on the same data: a new run does not begin at zero."""
    opened(tmp_path).charge("first run", TERMS, round=0, budget=NONE)
    with pytest.raises(LedgerError, match="budget is spent"):
        opened(tmp_path).charge("second run", TERMS, round=0, budget=epsilon(ONE, delta=1e-5) * 1.01)


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
    ledger = opened(tmp_path)
    for job in ("one", "two"):
        ledger.charge(job, TERMS, round=0, budget=NONE)
    path = tmp_path / "ledger.jsonl"
    path.write_text(spoil(path.read_text()))  # type: ignore[operator]
    with pytest.raises(LedgerError, match=says):
        ledger.charge("three", TERMS, round=0, budget=NONE)


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.head"])
def test_a_missing_file_is_a_refusal(tmp_path: Path, name: str) -> None:
    ledger = opened(tmp_path)
    ledger.charge("one", TERMS, round=0, budget=NONE)
    (tmp_path / name).unlink()
    with pytest.raises(LedgerError, match=f"{name} is missing"):
        ledger.charge("two", TERMS, round=1, budget=NONE)


@pytest.mark.parametrize("content", [b"", b"\x93\x00", b"one two\n"])
def test_a_damaged_head_is_told_without_pythons_words(tmp_path: Path, content: bytes) -> None:
    ledger = opened(tmp_path)
    ledger.charge("one", TERMS, round=0, budget=NONE)
    (tmp_path / "ledger.head").write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger\.head is damaged(, and [^(]*)?; put it back from a copy$"):
        ledger.charge("two", TERMS, round=1, budget=NONE)


def test_a_ledger_that_is_gone_altogether_is_missed_by_what_the_server_has_seen(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="it holds 0 charges, and the server has had 2 answers from this client"):
        opened(tmp_path).charge("job", replace(TERMS, known=2), round=2, budget=NONE)
    assert not list(tmp_path.glob("ledger*"))


def test_a_ledger_of_other_data_is_a_refusal(tmp_path: Path) -> None:
    opened(tmp_path).charge("one", TERMS, round=0, budget=NONE)
    with pytest.raises(LedgerError, match="is of another data set"):
        opened(tmp_path, "other").charge("two", TERMS, round=0, budget=NONE)


def test_what_a_crash_left_of_a_line_is_no_charge(tmp_path: Path) -> None:
    """A line that its head does not count yet: nothing had begun."""
    ledger = opened(tmp_path)
    ledger.charge("one", TERMS, round=0, budget=NONE)
    for torn in ('{"kind": "char', '{"kind": "charge", "job": "two", "noise": 1.0, "rate": 0.1, "steps": 10}\n'):
        with (tmp_path / "ledger.jsonl").open("a") as f:
            f.write(torn)
        assert ledger.charges() == ONE
    ledger.charge("two", TERMS, round=1, budget=NONE)
    assert opened(tmp_path).charges() == 2 * ONE


def test_a_crash_between_the_first_line_and_its_head_is_survived(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
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


def rechained(folder: Path, lines: list[str]) -> None:
    """Write these lines as a ledger whose hashes are all right."""
    before = "0" * 64
    for line in lines:
        before = sha256((before + line).encode()).hexdigest()
    (folder / "ledger.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "ledger.head").write_text(f"{len(lines)} {before}\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", -1000), ("steps", 0), ("rate", 0.0), ("rate", 1.5), ("noise", -1.0), ("noise", float("nan"))],
)
def test_a_line_that_would_pay_something_back_is_refused(tmp_path: Path, name: str, value: float) -> None:
    """Whoever can write it can write the hashes too."""
    opened(tmp_path).charge("one", TERMS, round=0, budget=NONE)
    line = json.loads((tmp_path / "ledger.jsonl").read_text())
    rechained(tmp_path, [json.dumps(line), json.dumps(line | {"job": "two", name: value})])
    with pytest.raises(LedgerError, match=f"ledger.jsonl line 2 is none that was written here: .*{name}"):
        opened(tmp_path).spent(1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", n) for n in (-1000, 0)),
        *(("rate", q) for q in (0.0, -0.1, 1.01, float("nan"))),
        *(("noise", z) for z in (0.0, -1.0, float("nan"), float("inf"))),
        *(("clip", c) for c in (0.0, -1.0, 1e-45, 1e30, float("nan"), float("inf"))),
        *(("delta", d) for d in (0.0, 1.0, -1e-5, float("nan"))),
        *(("head_share", h) for h in (0.0, 1.0, -3.0, float("nan"))),
    ],
)
def test_terms_that_no_mechanism_has_are_refused_before_the_charge(tmp_path: Path, name: str, value: float) -> None:
    """Whoever sent them, and by whatever way they came."""
    with pytest.raises(PrivacyError, match=name):
        opened(tmp_path).charge("job", replace(TERMS, **{name: value}), round=0, budget=NONE)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_failure_is_a_jobs_only_answer(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.charge("job", TERMS, round=0, budget=NONE)
    ledger.fail("job")
    for _ in range(2):
        again = opened(tmp_path)
        again.charge("job", TERMS, round=0, budget=NONE)
        with pytest.raises(PrivateJobFailed):
            again.answer("job")
    assert opened(tmp_path).charges() == ONE


def test_an_answer_whose_line_a_crash_left_out_is_known_before_it_is_sent(tmp_path: Path) -> None:
    """Else its job, sent again after the next one took the file over, would be trained again for nothing."""
    ledger = opened(tmp_path)
    ledger.charge("one", TERMS, round=0, budget=NONE)
    CachedReply(tmp_path).keep("one", update())  # and here the process was killed
    assert opened(tmp_path).answer("one") is not None
    ledger.charge("two", TERMS, round=1, budget=NONE)
    ledger.keep("two", update())
    ledger.charge("one", TERMS, round=0, budget=NONE)
    assert ledger.charges() == 3 * ONE


@pytest.mark.parametrize(("unit", "delta"), [("example", 1e-5), ("row", 1e-6)])
def test_a_ledger_has_one_unit_and_one_delta(tmp_path: Path, unit: str, delta: float) -> None:
    opened(tmp_path).charge("one", TERMS, round=0, budget=NONE)
    with pytest.raises(LedgerError, match=r"a ledger has one dp\.(unit|delta)"):
        opened(tmp_path, unit=unit).charge("two", TERMS, round=1, budget=NONE, delta=delta)
    assert opened(tmp_path).charges() == ONE


def test_the_clients_own_delta_decides_what_its_budget_allows(tmp_path: Path) -> None:
    budget = epsilon(ONE, delta=1e-2)
    with pytest.raises(LedgerError, match="budget is spent"):
        opened(tmp_path).charge("job", replace(TERMS, delta=1e-2), round=0, budget=budget, delta=1e-6)
    opened(tmp_path).charge("job", replace(TERMS, delta=1e-2), round=0, budget=budget, delta=1e-2)


def test_a_ledger_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    ledger = opened(tmp_path, mark=tmp_path / "marks" / "0.head")
    ledger.charge("job", TERMS, round=0, budget=NONE)
    ledger.keep("job", update())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "ledger.jsonl",
        "ledger.head",
        "ledger.salt",
        "answer.safetensors",
        "0.head",
    }
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
