"""What of a client's adapter a job has it send, and what stays: together they are all of it, and neither is both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.jobs import Job, is_personal, kept_part, shared_part, shared_start, start_with, why_rows_cannot_stay
from fedlora.lora import LoRA, append_rank, delta, join, split_rank
from tests.support.adapters import SHAPES, factors

ROWS = st.integers(0, 3)


@settings(max_examples=20)
@given(st.integers(0, 10**6), ROWS)
def test_an_adapter_whose_rank_is_split_is_the_sum_of_both_pieces(seed: int, rows: int) -> None:
    whole = factors(seed)
    first, last = split_rank(whole, rows)
    assert_close(vars(append_rank(first, last)), vars(whole), rtol=0, atol=0)
    assert {len(a) for a in first.A.values()} == {4 - rows} and first.H == whole.H and not last.H
    assert_close(delta(join(*filter(None, (first, last)))), delta(whole))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from(["ABH", "AB", "AH", "B"]))
def test_what_is_sent_and_what_stays_is_all_that_a_client_trained(seed: int, rows: int, shares: str) -> None:
    job, trained = Job(factors(0), shares=shares, keeps_rank=rows), factors(seed)
    assert shared_part(job, trained).numel() + kept_part(job, trained).numel() == sum(
        t.numel() for s, _, t in trained.matrices() if s in "ABH"
    )
    sent = {(s, m): t.shape for s, m, t in shared_part(job, trained).matrices()}
    assert sent == {(s, m): t.shape for s, m, t in shared_start(job).matrices()}
    worn = start_with(job, kept_part(job, trained))
    assert_close(vars(shared_part(job, worn)), vars(shared_start(job)), rtol=0, atol=0)
    assert_close(vars(kept_part(job, worn)), vars(kept_part(job, trained)), rtol=0, atol=0)


def test_a_client_with_nothing_of_its_own_starts_where_the_job_does() -> None:
    job = Job(factors(0), keeps_rank=2)
    assert_close(vars(start_with(job, LoRA())), vars(job.start), rtol=0, atol=0)
    assert is_personal(job) and not is_personal(Job(factors(0)))


def test_rows_that_were_kept_for_another_job_are_worn_by_none() -> None:
    """A server that asks for one row more gets what was trained from its own start, and none that stayed before."""
    kept = kept_part(Job(factors(0), keeps_rank=2), factors(1))
    for rows in (0, 1, 3):
        job = Job(factors(0), keeps_rank=rows)
        assert_close(vars(start_with(job, kept)), vars(job.start), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (Job(factors(0), keeps_rank=3), ""),
        (Job(factors(0), keeps_rank=4), "of rank 4 that leaves none to share"),
        (Job(factors(0), keeps_rank=1, resumes=True), "go with no sketch"),
        (Job(factors(0), keeps_rank=1, sketch={"q": [0]}), "go with no sketch"),
        (Job(LoRA(factors(0).A, factors(0).B, R=dict.fromkeys(SHAPES, torch.eye(4))), keeps_rank=1), "core R"),
        (Job(LoRA({"q": torch.ones(4)}, {"q": torch.ones(6)}), keeps_rank=1), "VeRA's vectors"),
    ],
    ids=["some", "all", "resumes", "sketch", "core", "vera"],
)
def test_a_job_that_cannot_leave_rows_says_why(job: Job, why: str) -> None:
    assert why in why_rows_cannot_stay(job) and bool(why) == bool(why_rows_cannot_stay(job))
