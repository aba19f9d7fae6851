"""Adapters as vectors, and who holds which part."""

from dataclasses import asdict, fields, replace
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.jobs import MaskingTerms, PrivacyTerms
from fedlora.lora import LoRA
from fedlora.messages.parts import (
    ALWAYS,
    Parts,
    PartTracker,
    flatten,
    hash_parts_and_job,
    job_hash,
    part_names,
    unflatten,
)
from fedlora.sections import Training
from fedlora.strategy import Job, Update
from fedlora.vectors import from_vector, to_vector
from tests.support.adapters import factors


@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from(["A", "BH", "ABH", ""]))
def test_an_adapter_comes_back_from_its_bytes_and_from_its_vector(seed: int, rank: int, sides: str) -> None:
    lora = factors(seed, rank).only(sides)
    assert_close(vars(unflatten(flatten(lora, torch.float64).content)), vars(lora), rtol=0, atol=0)
    assert_close(vars(from_vector(to_vector(lora, torch.float64), lora)), vars(lora), rtol=0, atol=0)


def test_the_name_is_of_the_content() -> None:
    assert flatten(factors(1)).name == flatten(factors(1)).name != flatten(factors(2)).name
    assert flatten(factors(1)).name != flatten(factors(1), torch.bfloat16).name


def test_the_name_does_not_depend_on_the_order_of_the_modules() -> None:
    lora = factors(1)
    turned = LoRA(**{s: dict(reversed(lora.side(s).items())) for s in "HBA"})
    assert flatten(turned).name == flatten(lora).name


def test_an_adapter_that_does_not_fit_its_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="the vector has"):
        from_vector(to_vector(factors(1), torch.float32)[:-1], factors(1))


def test_what_a_client_holds_does_not_cross_the_wire_again() -> None:
    parts, traffic, frozen = Parts(), PartTracker(), factors(1).only("A")
    first = traffic.send(0, parts.of(Job(start=factors(2).only("B").over(frozen))))
    then = traffic.send(0, parts.of(Job(start=factors(3).only("B").over(frozen))))
    assert set(first) == {"A", "B"} and set(then) == {"B"}
    assert traffic.down == sum(flat.nbytes for parts in (first, then) for flat in parts.values())
    assert then["B"].nbytes == 4 * sum(t.numel() for t in factors(3).B.values())


def test_only_new_residuals_cross_the_wire() -> None:
    parts, traffic, residuals = Parts(), PartTracker(), [factors(i).only("AB") for i in (1, 2)]
    traffic.send(0, parts.of(Job(start=LoRA(), offset=(residuals[0],))))
    assert set(traffic.send(0, parts.of(Job(start=LoRA(), offset=tuple(residuals))))) == {"offset 1"}
    assert set(traffic.send(1, parts.of(Job(start=LoRA(), offset=tuple(residuals))))) == {"offset 0", "offset 1"}


def test_uploads_count_what_is_shared() -> None:
    traffic = PartTracker()
    traffic.receive(Update(factors(1).only("B"), 1, 0.0))
    assert traffic.up == 4 * sum(b.numel() for b in factors(1).B.values())


TERMS = PrivacyTerms(noise=1.1, clip=0.5, head_share=0.3, rate=0.02, steps=7, delta=1e-6)
JOB = Job(factors(1), offset=(factors(5).only("AB"),), privacy=TERMS)
MASKING = MaskingTerms(context="round 1 (ff)", weight=0.5, reach=1.0, members=3, inbox={})
OTHERS = {
    "start": factors(2),
    "offset": (factors(6).only("AB"),),
    "trains": "B",
    "shares": "B",
    "sketch": {"q": (0, 2)},
    "gain": {"q": 2.0},
    "resumes": True,
    "right": factors(3).A,
    "left": factors(3).B,
    "keeps_rank": 2,
    "stage": "personal",
    "example_clip": 0.5,
    "correction": factors(9).only("AB"),
    "privacy": replace(TERMS, noise=1.2),
    "metrics": False,
    "upload": "int8",
    "feedback": True,
    "turns": ("BH", "AH"),
    "smoothing": (0.25, 0.5, 0.25),
    "overrides": {"lr": 0.5},
    "lr_factor": 0.5,
    "training": Training(lr=0.5),
    "seed": 1,
    "round": 1,
    "rounds": 2,
    "scales": True,
}


@pytest.mark.parametrize("field", [f.name for f in fields(Job) if f.name != "masking"])
def test_the_digest_changes_with_every_field_of_a_job(field: str) -> None:
    assert hash_parts_and_job(replace(JOB, **{field: OTHERS[field]})) != hash_parts_and_job(JOB)


def test_a_job_that_sets_no_newer_field_has_the_digest_that_older_versions_gave_it() -> None:
    asked = {name: getattr(JOB, name) for name in ALWAYS}
    training = {key: value for key, value in asdict(JOB.training).items() if key not in ("loss", "regulariser")}
    asked |= {"training": training, "privacy": asdict(TERMS) | {"known": 0}}
    names = part_names(Parts().of(JOB))
    older = sha256(repr((sorted(asked.items()), names["start"], names["offset"])).encode()).hexdigest()
    assert hash_parts_and_job(JOB) == hash_parts_and_job(replace(JOB, scales=False)) == older


def test_the_digest_stays_whatever_is_another_in_every_attempt_at_a_round() -> None:
    again = replace(JOB, privacy=replace(TERMS, known=3), masking=MASKING)
    assert hash_parts_and_job(again) == hash_parts_and_job(JOB)


def test_the_digest_tells_a_part_of_the_start_from_one_of_the_offset() -> None:
    names = part_names(Parts().of(JOB))
    moved = names | {"start": names["start"][:-1], "offset": (names["start"][-1], *names["offset"])}
    assert job_hash(JOB, **names) != job_hash(JOB, **moved)


def test_the_digest_tells_a_projection_from_the_right_from_one_from_the_left() -> None:
    right = replace(JOB, right=OTHERS["right"])
    names = part_names(Parts().of(right))
    assert job_hash(right, **names) != job_hash(right, **names | {"right": (), "left": names["right"]})
    assert hash_parts_and_job(replace(JOB, right=factors(4).A)) != hash_parts_and_job(right)
