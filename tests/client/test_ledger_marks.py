"""The mark of a ledger, in another folder: a ledger that is gone, or older than its mark, is a refusal."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.client.ledger import Ledger
from fedlora.errors import LedgerError
from tests.client.test_ledger import NONE, TERMS, opened


def charged(root: Path, *jobs: str) -> Ledger:
    """The ledger in `root`/ledgers, charged with these jobs."""
    ledger = opened(root / "ledgers", mark=root / "marks" / "0.head")
    for job in jobs:
        ledger.charge(job, TERMS, round=0, budget=NONE)
    return ledger


def test_a_ledger_that_is_gone_is_missed(tmp_path: Path) -> None:
    charged(tmp_path, "one", "two")
    shutil.rmtree(tmp_path / "ledgers")
    with pytest.raises(LedgerError, match=r"ledger\.head is missing, and .* has seen 2 lines of it; put it back"):
        charged(tmp_path, "three")


def test_a_ledger_that_was_put_back_from_an_old_copy_is_older_than_its_mark(tmp_path: Path) -> None:
    charged(tmp_path, "one")
    shutil.copytree(tmp_path / "ledgers", tmp_path / "copy")
    charged(tmp_path, "two")
    shutil.rmtree(tmp_path / "ledgers")
    (tmp_path / "copy").rename(tmp_path / "ledgers")
    with pytest.raises(LedgerError, match=r"is older than its mark: it holds 1 lines, and .* has seen 2"):
        charged(tmp_path, "three")


def test_another_ledger_in_its_place_is_not_the_one_that_was_marked(tmp_path: Path) -> None:
    charged(tmp_path, "one")
    shutil.rmtree(tmp_path / "ledgers")
    other = opened(tmp_path / "ledgers")
    for job in ("eins", "zwei"):
        other.charge(job, TERMS, round=0, budget=NONE)
    with pytest.raises(LedgerError, match="is older than its mark"):
        charged(tmp_path, "three")


def test_a_ledger_that_another_client_charged_meanwhile_is_ahead_of_the_mark_and_goes_on(tmp_path: Path) -> None:
    """Two federations of one hospital: each client has a mark of its own, and they share the ledger."""
    charged(tmp_path, "one")
    opened(tmp_path / "ledgers", mark=tmp_path / "elsewhere").charge("two", TERMS, round=0, budget=NONE)
    assert len(charged(tmp_path, "three").charges()) == 3


def test_a_ledger_of_before_there_were_marks_goes_on_and_has_one_from_then_on(tmp_path: Path) -> None:
    opened(tmp_path / "ledgers").charge("one", TERMS, round=0, budget=NONE)
    assert len(charged(tmp_path, "two").charges()) == 2
    assert (tmp_path / "marks" / "0.head").read_text() == (tmp_path / "ledgers" / "ledger.head").read_text()


@pytest.mark.parametrize("damage", [lambda p: p.write_text(""), lambda p: p.write_bytes(b"\xff\xfe")])
def test_a_mark_that_is_damaged_is_a_refusal(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    charged(tmp_path, "one")
    damage(tmp_path / "marks" / "0.head")
    with pytest.raises(LedgerError, match=r"0\.head is damaged"):
        charged(tmp_path, "two")
