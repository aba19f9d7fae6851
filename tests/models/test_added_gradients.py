"""What a job adds to its gradients: followed by every engine, with and without privacy, and by no other side."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from fedlora.checks.small_models import small_model
from fedlora.client.egress import check_start
from fedlora.errors import PolicyRefusal
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import LoRA, difference, map_factors
from fedlora.messages.sketch import select_rows
from fedlora.sections import Training
from fedlora.strategy import Client, load
from tests.support.cohorts import NOTHING, compared, double, filled, furthest, in_one_pass, one_by_one, tasks_of
from tests.support.float64 import in_float64

STEP = Training(optimizer="sgd", lr=1.0, steps=1, clip=0.0, batch_size=3)
TERMS = PrivacyTerms(noise=0.5, clip=0.05, head_share=0.3, rate=0.5, steps=1, delta=1e-5, seeded=True)


def correction(seed: int) -> LoRA:
    return map_factors(lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) / 8, START)


START = small_model("bert").start


@pytest.mark.parametrize("privacy", [None, TERMS], ids=["plain", "private"])
@pytest.mark.parametrize("train", [one_by_one, in_one_pass], ids=["serial", "stacked"])
def test_a_step_follows_its_gradient_and_the_correction(train: object, privacy: PrivacyTerms | None) -> None:
    small = small_model("bert")
    with in_float64(small.model):
        job = Job(double(START), training=STEP, privacy=privacy)
        own = [double(correction(i)) for i in range(3)]
        plain = train(small, tasks_of(small, [job] * 3))  # type: ignore[operator]
        moved = train(small, tasks_of(small, [replace(job, correction=c) for c in own]))  # type: ignore[operator]
    for (before, _), (after, _), c in zip(plain, moved, own, strict=True):
        shift = map_factors(lambda t, c: t + c, difference(after.lora, before.lora), c)
        assert furthest(shift, map_factors(torch.zeros_like, shift)) < 1e-9


def test_many_clients_follow_their_own_corrections_over_several_steps() -> None:
    small = small_model("bert")
    training = Training(lr=0.05, batch_size=2, prox=0.2, clip=0.3)
    jobs = [Job(filled(START, i), correction=correction(i), training=training) for i in range(3)]
    assert compared(small, jobs) < 1e-7


def test_a_correction_of_what_rests_is_refused_before_anything_is_trained() -> None:
    small = small_model("bert")
    wrong = {
        "B bert.*, and its start has none that is trained": Job(
            START, trains="AH", shares="AH", correction=correction(1)
        ),
        "A nowhere": Job(START, correction=LoRA(A={"nowhere": torch.zeros(2, 3)})),
        r"by \(1, 32\), and its start has \(2, 32\)": Job(
            START, correction=LoRA(A={m: a[:1] for m, a in START.A.items()})
        ),
    }
    for said, job in wrong.items():
        with pytest.raises(PolicyRefusal, match=said):
            check_start(small.model, job)
    check_start(small.model, Job(START, correction=correction(1)))


def test_a_sketch_narrows_the_correction_too() -> None:
    job = load("fslora").client_init(load("fslora").init(START), Client(0, 1, 1))
    narrow = select_rows(replace(job, correction=START))
    assert all(torch.equal(narrow.correction.A[m], a) for m, a in narrow.start.A.items())
    assert_close([b.shape for b in narrow.correction.B.values()], [b.shape for b in narrow.start.B.values()])
    assert NOTHING.numel() == 0
