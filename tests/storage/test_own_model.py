"""Each client's own model: what it keeps over the job, and after a stage of its own what that has left."""

from dataclasses import replace
from pathlib import Path

import torch
from torch.testing import assert_close

from fedlora.jobs import Job, kept_part, start_with
from fedlora.lora import delta, join
from fedlora.storage.client_state import ClientState
from fedlora.storage.own_model import by_itself, own_model
from tests.support.adapters import factors

JOB = Job(factors(0), round=3, rounds=4, stage="personal")


def test_a_client_goes_on_from_the_model_that_it_has_and_keeps_all_that_it_trains() -> None:
    for job in (replace(JOB, keeps_rank=1), replace(JOB, shares="A"), JOB):
        kept = kept_part(replace(job, stage="round"), factors(1))
        alone = by_itself(job, kept)
        assert_close(vars(alone.start), vars(start_with(replace(job, stage="round"), kept)), rtol=0, atol=0)
        assert_close(vars(kept_part(alone, factors(2))), vars(factors(2)), rtol=0, atol=0)
        assert alone.shares == "" and not alone.metrics and alone.seed != job.seed


def test_who_trains_alone_has_nothing_of_the_rounds() -> None:
    job = replace(JOB, shares="A", stage="alone")
    assert by_itself(job, factors(1).only("BH")).start.B == job.start.B


def test_a_client_that_resumes_goes_on_from_the_model_that_all_have() -> None:
    """Its factors are subtracted in rounds, so that its model is the offset: here it starts from that and B = 0."""
    job = replace(JOB, resumes=True, offset=(factors(5).only("AB"),))
    alone = by_itself(job, factors(1).only("AB"))
    assert_close(delta(join(*alone.offset, alone.start)), delta(job.offset[0]))
    assert all(torch.equal(a, factors(1).A[m]) for m, a in alone.start.A.items())


def test_what_a_stage_has_left_is_the_clients_model_and_without_it_that_of_the_rounds_is(tmp_path: Path) -> None:
    rounds, left = factors(1).only("B"), factors(2)
    job = replace(JOB, shares="AH")
    ClientState(tmp_path).keep(3, rounds)
    assert_close(vars(start_with(*own_model(job, tmp_path))), vars(rounds.over(job.start)))
    ClientState(tmp_path, "personal").keep(2, factors(9))  # of a shorter run, which was gone on with
    assert_close(vars(start_with(*own_model(job, tmp_path))), vars(rounds.over(job.start)))
    ClientState(tmp_path, "personal").keep(3, left)
    assert_close(vars(start_with(*own_model(job, tmp_path))), vars(left))
    assert_close(vars(start_with(*own_model(replace(job, stage="round"), tmp_path))), vars(rounds.over(job.start)))


def test_a_file_of_a_stage_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    ClientState(tmp_path, "personal").keep(3, factors(2))
    (tmp_path / "personal-000003.safetensors").write_bytes(b"half")
    assert_close(vars(start_with(*own_model(JOB, tmp_path))), vars(JOB.start))
    assert not ClientState(tmp_path, "personal").of(1)
