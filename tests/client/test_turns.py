"""Sides that are trained in turn within a round, step by step."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.checks.small_models import SmallModel, small_model
from fedlora.client import training
from fedlora.jobs import Job, PrivacyTerms
from fedlora.lora import LoRA
from fedlora.models.optimizer import smooth
from fedlora.privacy.dpsgd import STANDARD
from fedlora.privacy.record_level import record_level_dp
from fedlora.run.plan import Plan, job_for
from fedlora.sections import PrivacyConfig, Training
from fedlora.strategies.la_lora import FILTER
from fedlora.strategy import Client, load
from tests.support.cohorts import filled
from tests.support.float64 import in_float64, without_dropout

TURNS = ("BH", "AH")
SGD = Training(optimizer="sgd", lr=0.1, batch_size=100, clip=0)
WITH_MEMORY = {
    "adamw with decay": Training(lr=1e-2, weight_decay=0.1, batch_size=4),
    "momentum": replace(SGD, momentum=0.9, weight_decay=0.1),
    "fedprox": replace(SGD, prox=1.0),
}
TERMS = PrivacyTerms(noise=0.5, clip=0.1, head_share=0.3, rate=0.5, steps=4, delta=1e-5, seeded=True)


@pytest.fixture
def small() -> SmallModel:
    return small_model("bert")


@pytest.fixture
def start(small: SmallModel) -> LoRA:
    return filled(small.start, 1)


def after(small: SmallModel, job: Job, steps: int) -> LoRA:
    """The adapter after so many local steps."""
    job = replace(job, training=replace(job.training, steps=steps))
    if job.privacy:
        job = replace(job, privacy=replace(job.privacy, steps=steps))
        return training.train_privately(small.model, job, 0, small.clients[0].records, LoRA())[0].lora
    return training.train(small.model, job, 0, small.clients[0].train, LoRA())[0].lora


def moved(before: LoRA, now: LoRA) -> str:
    """The sides of which every matrix moved. Fails where some of a side moved, and others did not."""
    sides = {s: {not torch.equal(t, now.side(s)[m]) for m, t in before.side(s).items()} for s in "ABH"}
    assert all(len(found) == 1 for found in sides.values())
    return "".join(s for s, found in sides.items() if found == {True})


@pytest.mark.parametrize(
    ("settings", "turns", "privacy"),
    [
        *((settings, TURNS, privacy) for settings in WITH_MEMORY for privacy in (None, TERMS)),
        ("momentum", ("BH", "BH", "AH", "AH"), None),
        ("adamw with decay", ("H", "AB"), TERMS),
    ],
)
def test_a_side_that_rests_stays_to_the_bit_whatever_an_optimizer_remembers(
    small: SmallModel, start: LoRA, settings: str, turns: tuple[str, ...], privacy: Any
) -> None:
    with in_float64(small.model):
        job = Job(start, turns=turns, training=WITH_MEMORY[settings], privacy=privacy)
        adapters = [start, *(after(small, job, steps) for steps in range(1, 5))]
    found = [moved(one, other) for one, other in pairwise(adapters)]
    assert found == ["".join(sorted(turns[i % len(turns)])) for i in range(4)]


def test_the_second_step_sees_what_the_first_has_done(small: SmallModel, start: LoRA) -> None:
    """B_1 = B_0 - eta dB(A_0, B_0), and A_1 = A_0 - eta dA(A_0, B_1): not the gradient of the start."""
    with in_float64(small.model), without_dropout(small.model.net):
        both = Job(start, trains="AB", shares="AB", training=replace(SGD, lr=30.0))
        turned = after(small, replace(both, turns=("B", "A")), 2)
        first = after(small, replace(both, trains="B", shares="B"), 1)
        second = after(small, replace(both, start=first.over(start), trains="A", shares="A"), 1)
        joint = after(small, both, 1)
    assert_close(turned.B, first.B, rtol=1e-9, atol=1e-12)
    assert_close(turned.A, second.A, rtol=1e-9, atol=1e-12)
    assert max(float((turned.A[m] - a).abs().max()) for m, a in joint.A.items()) > 1e-6


def test_examples_are_clipped_over_the_sides_in_turn(small: SmallModel, start: LoRA) -> None:
    """Their gradients are C long over what the step trains, not over all that the job trains."""
    with in_float64(small.model), without_dropout(small.model.net):
        job = Job(start, turns=("B", "AH"), example_clip=1e-3, training=replace(SGD, lr=1.0))
        alone = replace(job, trains="B", shares="B", turns=())
        assert_close(after(small, job, 1).B, after(small, alone, 1).B, rtol=1e-12, atol=0)


@pytest.mark.parametrize("privacy", [None, replace(TERMS, noise=2.0)], ids=["plain", "private"])
def test_the_filter_is_on_what_a_step_would_follow_without_it(small: SmallModel, start: LoRA, privacy: Any) -> None:
    """On the clipped, and on the noised gradient: the same step is filtered, noise and all."""
    job = Job(start, turns=TURNS, training=replace(SGD, lr=1.0, clip=1e-3), privacy=privacy)
    with in_float64(small.model), without_dropout(small.model.net):
        bare, filtered = (after(small, replace(job, smoothing=taps), 1) for taps in ((), FILTER))
    assert_close(filtered.H, bare.H, rtol=0, atol=0)
    for m, b in start.B.items():
        assert_close(filtered.B[m] - b, smooth(bare.B[m] - b, FILTER, 0), rtol=1e-9, atol=1e-12)


def test_noise_is_on_the_sides_of_the_step_alone(small: SmallModel, start: LoRA) -> None:
    noised = list[int]()

    def counted(total: torch.Tensor, **_: Any) -> torch.Tensor:
        noised.append(total.numel())
        return total.double()

    job = Job(start, turns=TURNS, training=SGD, privacy=replace(TERMS, steps=2))
    mechanism = replace(STANDARD, add_noise=counted)
    with in_float64(small.model):
        training.train_privately(small.model, job, 0, small.clients[0].records, LoRA(), mechanism)
    assert noised == [t.numel() for turn in ("BH", "AH") for s in sorted(turn) for t in start.side(s).values()]


def test_every_local_step_is_charged_whatever_sides_it_trains(start: LoRA) -> None:
    client, settings = Client(0, 400, 2, records=400), Training(steps=4, batch_size=8)
    dp = record_level_dp(PrivacyConfig(noise=1.0), settings, 3, [client])
    plan = Plan(rounds=3, cohort=1, training=settings, record_level=dp)
    alternating, joint = (
        job_for(load(name), load(name).init(start), client, plan, 0) for name in ("la_lora", "fedavg")
    )
    assert alternating.turns and alternating.privacy == joint.privacy and joint.privacy and joint.privacy.steps == 4
