"""Many clients in one pass, against the same clients trained one after another."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedlora.checks.small_models import KINDS, Kind, SmallModel, small_model
from fedlora.client import training
from fedlora.client.stacked import cohort
from fedlora.client.training import Trained, TrainingTask
from fedlora.jobs import Job
from fedlora.lora import LoRA, average, map_factors
from fedlora.sections import Training
from tests.support.float64 import in_float64

ADAMW = Training(lr=1e-2, batch_size=3, epochs=1)
NOTHING = LoRA()


def double(lora: LoRA) -> LoRA:
    return map_factors(lambda t: t.double(), lora)


def furthest(one: LoRA, other: LoRA) -> float:
    """The largest difference of two numbers at the same place."""
    assert {(s, m) for s, m, _ in one.matrices()} == {(s, m) for s, m, _ in other.matrices()}
    return max(float((t - other.side(s)[m]).abs().max()) for s, m, t in one.matrices())


def tasks_of(small: SmallModel, jobs: Sequence[Job], kept: Sequence[LoRA]) -> list[TrainingTask]:
    return [
        TrainingTask(client=i, job=job, kept=own, examples=data.train)
        for i, (job, own, data) in enumerate(zip(jobs, kept, small.clients, strict=True))
    ]


def one_by_one(small: SmallModel, tasks: Sequence[TrainingTask]) -> list[Trained]:
    return [training.perform(small.model, task) for task in tasks]


def rounds(small: SmallModel, job: Job, train, n: int = 3) -> LoRA:
    """The mean adapter after some rounds of clients that keep what the job leaves with them."""
    state, kept = double(small.start), [NOTHING] * 3
    for round in range(n):
        jobs = [replace(job, start=state, round=round, rounds=n, seed=7)] * 3
        results = train(small, tasks_of(small, jobs, kept))
        kept = [own for _, own in results]
        state = average([update.lora for update, _ in results], [1.0, 2.0, 3.0]).over(state)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_three_rounds_with_adamw_come_to_the_same_adapter(kind: Kind) -> None:
    small = small_model(kind)
    with in_float64(small.model):
        job = Job(start=NOTHING, training=ADAMW)
        serial = rounds(small, job, one_by_one)
        stacked = rounds(small, job, lambda s, tasks: cohort.train(s.model, tasks))
    assert furthest(serial, stacked) < 1e-7
    assert furthest(serial, small.start) > 1e-3
