"""Which data are a ledger's: those that share records with what was charged; of a dealt pool, the same deal."""

from pathlib import Path

import pytest

from fedlora.errors import LedgerError
from tests.client.test_ledger import NONE, TERMS, opened


def charge(folder: Path, job: str, *texts: str, dealt: bool = False) -> None:
    opened(folder, *texts, dealt=dealt).charge(job, TERMS, round=0, budget=NONE)


def test_data_with_a_record_more_or_less_are_the_same_data(tmp_path: Path) -> None:
    charge(tmp_path, "one", "a", "b", "c")
    charge(tmp_path, "two", "b", "c", "d")
    charge(tmp_path, "three", "d")  # which only the second charge brought
    assert len(opened(tmp_path, "a").charges()) == 3


def test_data_that_share_no_record_are_other_data(tmp_path: Path) -> None:
    charge(tmp_path, "one", "a", "b", "c")
    with pytest.raises(LedgerError, match="none of these 2 records was charged there"):
        charge(tmp_path, "two", "x", "y")


def test_a_pool_that_is_dealt_otherwise_is_refused_and_nobody_is_told_to_begin_anew(tmp_path: Path) -> None:
    charge(tmp_path, "one", "a", "b", "c", dealt=True)
    charge(tmp_path, "two", "c", "b", "a", dealt=True)
    with pytest.raises(LedgerError, match="in a new ledger records that were charged would begin anew"):
        charge(tmp_path, "three", "b", "c", "d", dealt=True)


def test_what_is_known_of_the_records_says_nothing_without_the_salt(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        charge(tmp_path / folder, "job", "a", "b")
    one, two = (tmp_path / folder for folder in ("one", "two"))
    assert (one / "ledger.records").read_bytes() != (two / "ledger.records").read_bytes()
    assert len((one / "ledger.salt").read_text().strip()) == 64


@pytest.mark.parametrize("name", ["ledger.salt", "ledger.records"])
def test_a_file_that_is_missing_is_a_refusal(tmp_path: Path, name: str) -> None:
    charge(tmp_path, "one", "a", "b")
    (tmp_path / name).unlink()
    with pytest.raises(LedgerError, match=f"{name} is missing"):
        charge(tmp_path, "two", "a", "b", "c")


def test_records_that_a_crash_left_without_their_line_do_not_count(tmp_path: Path) -> None:
    charge(tmp_path, "one", "a", "b")
    with (tmp_path / "ledger.records").open("ab") as f:
        f.write(b"x" * 16)
    charge(tmp_path, "two", "a", "b", "c")
    assert (tmp_path / "ledger.records").stat().st_size == 3 * 16


def test_no_sentence_tells_a_hash_of_the_data(tmp_path: Path) -> None:
    charge(tmp_path, "one", "a")
    held = opened(tmp_path, "b").data
    with pytest.raises(LedgerError) as error:
        charge(tmp_path, "two", "b")
    assert held.fingerprint[:12] not in str(error.value)
