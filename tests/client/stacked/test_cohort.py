"""Many clients in one pass, against the same clients trained one after another."""

from dataclasses import replace

import pytest
import torch

from fedlora.checks.small_models import KINDS, Kind, small_model
from fedlora.client.stacked import cohort
from fedlora.errors import ClientFailed, TrainingDiverged
from fedlora.jobs import Job
from fedlora.lora import LoRA, delta, leading, map_factors
from fedlora.sections import Training
from fedlora.strategies.la_lora import FILTER
from fedlora.strategy import Client, load
from tests.support.cohorts import NOTHING, compared, double, filled, furthest, in_one_pass, one_by_one, rounds, tasks_of
from tests.support.float64 import in_float64, without_dropout

ADAMW = Training(lr=1e-2, batch_size=3, epochs=1)
SGD = Training(optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.1, batch_size=3)
SETTINGS = {
    "momentum and decay": Job(NOTHING, training=SGD),
    "FedProx, a clip and a cosine": Job(
        NOTHING, training=replace(ADAMW, prox=0.5, clip=0.01, schedule="cosine", warmup=0.2, weight_decay=0.1)
    ),
    "rates of B and of the head": Job(NOTHING, training=replace(ADAMW, lora_plus=4, head_lr=1e-3, clip=0)),
    "accumulation, two epochs": Job(NOTHING, training=replace(ADAMW, batch_size=2, accumulate=2, epochs=2)),
    "B alone": Job(NOTHING, trains="B", shares="B", training=ADAMW),
    "A and a head that stays": Job(NOTHING, trains="AH", shares="A", training=ADAMW),
    "B that stays": Job(NOTHING, shares="AH", training=ADAMW),
    "going on from its own factors": Job(NOTHING, resumes=True, training=ADAMW),
    "sides in turn": Job(NOTHING, turns=("BH", "AH"), training=replace(ADAMW, weight_decay=0.1, prox=0.5, clip=0.01)),
    "sides in turn, filtered": Job(NOTHING, turns=("B", "B", "AH"), smoothing=FILTER, training=SGD),
    "clipped examples": Job(NOTHING, example_clip=0.05, training=ADAMW),
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_with_adamw_come_to_the_same_adapter(kind: Kind) -> None:
    small = small_model(kind)
    with in_float64(small.model):
        job = Job(start=NOTHING, training=ADAMW)
        serial = rounds(small, [job] * 3, one_by_one)
        stacked = rounds(small, [job] * 3, in_one_pass)
    assert furthest(serial, stacked) < 1e-7
    assert furthest(serial, small.start) > 1e-3


@pytest.mark.parametrize("job", SETTINGS.values(), ids=list(SETTINGS))
def test_what_a_job_asks_of_one_client_it_has_of_many(job: Job) -> None:
    small = small_model("bert")
    with in_float64(small.model):
        serial, stacked = rounds(small, [job] * 3, one_by_one), rounds(small, [job] * 3, in_one_pass)
    assert furthest(serial, stacked) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_clients_of_unlike_ranks_stay_within_theirs(kind: Kind) -> None:
    small = small_model(kind)
    starts = [leading(filled(small.start, i), rank) for i, rank in enumerate((1, 2, 1))]
    assert compared(small, [Job(start, training=replace(ADAMW, weight_decay=0.1)) for start in starts]) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_a_core_between_the_factors_is_trained(kind: Kind) -> None:
    small = small_model(kind)
    start = load("fed_sb").init(filled(small.start, 0))
    assert compared(small, [Job(double(start), trains="RH", shares="RH", training=ADAMW)] * 3) < 1e-7


@pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "momentum, decay"])
@pytest.mark.parametrize(("heads", "scales"), [(2, False), (2, True), (1, True)])
def test_heads_of_a_core_and_their_scales_are_trained(heads: int, scales: bool, training: Training) -> None:
    small = small_model("bert")
    start = double(load("ravan", heads=heads).init(filled(small.start, 0)))
    training = replace(training, prox=0.1, head_lr=1e-3)
    assert compared(small, [Job(start, trains="RH", shares="RH", scales=scales, training=training)] * 3) < 1e-7


def test_a_correction_of_a_core_leaves_the_scales_of_its_heads() -> None:
    small = small_model("bert")
    start = double(load("ravan").init(filled(small.start, 0)))
    correction = map_factors(torch.ones_like, start.only("RH"))
    job = Job(start, trains="RH", shares="RH", scales=True, correction=correction, training=SGD)
    assert compared(small, [job] * 3) < 1e-7


def test_cores_in_unlike_blocks_are_trained_apart() -> None:
    small = small_model("bert")
    start = filled(small.start, 0)
    strategies = [load("ravan", heads=h, scales=s) for h, s in ((1, False), (2, False), (2, True))]
    jobs = [s.client_init(s.init(start), Client(0, 1, 2)) for s in strategies]
    assert len({cohort.group(small.model, task) for task in tasks_of(small, jobs)}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_gains_and_offsets_are_those_of_the_job(kind: Kind) -> None:
    small = small_model(kind)
    offset = (filled(small.start, 1).only("AB"), LoRA(D=delta(filled(small.start, 2))))
    gains = [{m: 1 + i / 3} for i, m in enumerate(small.start.A)] * 3
    jobs = [Job(filled(small.start, 3), offset=offset, gain=gain, training=ADAMW) for gain in gains[:3]]
    assert compared(small, jobs) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_in_float32_agrees_to_rounding(kind: Kind) -> None:
    small = small_model(kind)
    job = Job(small.start, training=replace(SGD, steps=1, momentum=0, clip=0))
    with without_dropout(small.model.net):
        tasks = tasks_of(small, [job] * 3)
        pairs = zip(one_by_one(small, tasks), in_one_pass(small, tasks), strict=True)
        assert max(furthest(one.lora, other.lora) for (one, _), (other, _) in pairs) < 1e-5


def test_a_client_whose_loss_is_no_number_fails_alone() -> None:
    small = small_model("bert")
    wild = map_factors(lambda t: t * float("nan"), small.start)
    tasks = tasks_of(small, [Job(small.start, training=ADAMW), Job(wild, training=ADAMW), Job(small.start)])
    first, second, third = cohort.train(small.model, tasks)
    assert isinstance(second, TrainingDiverged)
    assert not isinstance(first, Exception) and not isinstance(third, Exception)
    assert all(bool(t.isfinite().all()) for _, _, t in first[0].lora.matrices())


def test_a_client_without_examples_fails_alone() -> None:
    small = small_model("bert")
    tasks = tasks_of(small, [Job(small.start, training=ADAMW)] * 3)
    first, second, _ = cohort.train(small.model, [tasks[0], replace(tasks[1], examples=()), tasks[2]])
    assert isinstance(second, ClientFailed) and not isinstance(first, Exception)


def test_the_model_is_as_it_was_afterwards() -> None:
    small = small_model("llama")
    small.model.set_adapter(small.start)
    before = small.logits()
    cohort.train(small.model, tasks_of(small, [Job(small.start, training=ADAMW)] * 3))
    small.model.set_adapter(small.start)
    assert torch.equal(before, small.logits())


def test_the_loss_told_is_the_mean_over_all_targets() -> None:
    small = small_model("llama")
    with in_float64(small.model):
        tasks = tasks_of(small, [Job(double(small.start), training=ADAMW)] * 3)
        losses = [[update.loss for update, _ in train(small, tasks)] for train in (one_by_one, in_one_pass)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
