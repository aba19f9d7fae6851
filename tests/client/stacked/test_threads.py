"""The micro-batches of a pass on two threads come to what they come to on one, whichever thread is first."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, active_count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedlora.checks.small_models import KINDS, Kind, SmallModel, small_model
from fedlora.client.stacked.adapters import Adapters
from fedlora.jobs import Job, PrivacyTerms
from fedlora.kernels.threads import draws_besides
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.sections import Training
from fedlora.seeds import seeded
from tests.support.cohorts import NOTHING, double, furthest, in_one_pass, rounds, tasks_of
from tests.support.float64 import in_float64
from tests.support.threads import on, small_micro_batches

ADAMW = Training(lr=1e-2, batch_size=3, epochs=1)
TERMS = PrivacyTerms(noise=0.5, clip=0.05, head_share=0.3, rate=0.5, steps=3, delta=1e-5, seeded=True)
JOBS = {
    "plain": Job(NOTHING, training=ADAMW),
    "sides in turn": Job(NOTHING, turns=("BH", "AH"), training=ADAMW),
    "clipped examples": Job(NOTHING, example_clip=0.05, training=ADAMW),
    "private": Job(NOTHING, privacy=TERMS, training=replace(ADAMW, epochs=0)),
}


pytestmark = pytest.mark.usefixtures(small_micro_batches.__name__)


@contextmanager
def exact(small: SmallModel) -> Iterator[None]:
    """The model in float64, with dropout, within the block."""
    with in_float64(small.model):
        for module in small.model.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        yield


def trained(small: SmallModel, job: Job, count: int) -> LoRA:
    """What three rounds of three clients come to on so many threads."""
    with on(count):
        return rounds(small, [job] * 3, in_one_pass)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
def test_two_threads_come_to_what_one_comes_to(kind: Kind, job: Job) -> None:
    small = small_model(kind)
    with exact(small):
        one, two = trained(small, job, 1), trained(small, job, 2)
    assert furthest(one, two) < 1e-9
    assert furthest(one, double(small.start)) > 1e-3


def test_with_their_dropout_two_threads_come_to_the_same_bits_every_time() -> None:
    small = small_model("bert")
    first, *others = [trained(small, JOBS["plain"], 2) for _ in range(4)]
    assert all(furthest(first, other) == 0 for other in others)


class Draws(nn.Dropout):
    """A dropout that draws from torch's global generator, as many networks have one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.2, self.training)


def test_a_network_that_draws_from_the_global_generator_is_computed_on_one_thread() -> None:
    shared = small_model("bert")
    model = Model(shared.config, shared.lora, shared.schema, seed=0)  # one that no other test has
    model.net.get_base_model().dropout = Draws()
    small = replace(shared, model=model)
    first, *others = [trained(small, JOBS["plain"], 2) for _ in range(3)]
    assert all(furthest(first, other) == 0 for other in others)
    assert draws_besides(small.model) and not draws_besides(shared.model)


def test_a_network_that_cannot_be_copied_is_computed_on_one_thread() -> None:
    shared = small_model("bert")
    small = replace(shared, model=Model(shared.config, shared.lora, shared.schema, seed=0))
    small.model.net.lock = Lock()
    assert furthest(trained(small, JOBS["plain"], 2), trained(shared, JOBS["plain"], 2)) < 1e-5


def test_a_thread_that_begins_afterwards_has_as_many_of_torchs_as_before() -> None:
    small = small_model("bert")
    with on(2):
        in_one_pass(small, tasks_of(small, [replace(JOBS["plain"], start=small.start)] * 3))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2


def test_an_error_in_a_micro_batch_is_raised_and_no_thread_goes_on() -> None:
    small = small_model("bert")
    before = active_count()

    def fail(places: Any) -> None:
        raise ValueError(str(places))

    job = replace(JOBS["plain"], start=small.start)
    adapters = Adapters(small.model, tasks_of(small, [job] * 3), [1, 1, 1])
    trained(small, JOBS["plain"], 2)  # so that the model is known
    with on(2), adapters.training(small.model, seeded(0)), pytest.raises(ValueError, match="3"):
        list(adapters.rows.each(fail, [[3], [4], [5]]))
    assert active_count() == before
