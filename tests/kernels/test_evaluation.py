"""A model measured in micro-batches of like lengths is as good as it is example by example."""

from contextlib import nullcontext
from random import Random

import pytest
import torch
from torch import Tensor

from fedlora.encoding.encoder import Example
from fedlora.kernels.evaluation import measure, measure_each
from fedlora.kernels.example_batches import micro_batches
from fedlora.kernels.threads import at_once
from fedlora.models.model import Model
from tests.client.stacked.test_row_pass import LEARNED, model_of, row
from tests.support.float64 import in_float64
from tests.support.models import random_adapter
from tests.support.threads import on, small_micro_batches


@pytest.fixture(scope="module", params=LEARNED)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[Example]]:
    """A model that has learned something, and examples of it, of several lengths."""
    kind, schema = LEARNED[request.param]
    model = model_of(kind, schema, tmp_path_factory.mktemp("model"))
    model.set_adapter(random_adapter(model, 1))
    return model, model.encoder([row(i % 5, schema) for i in range(11)])


def test_all_figures_are_those_of_the_plain_form(measured: tuple[Model, list[Example]]) -> None:
    model, examples = measured
    with in_float64(model):
        plain, quick = model.metrics(examples, batch_size=1).values(), measure(model, examples).values()
    assert quick == pytest.approx(plain, rel=1e-7, abs=1e-7)


def test_several_sets_are_measured_each_by_itself(measured: tuple[Model, list[Example]]) -> None:
    model, examples = measured
    sets, asked = [examples[:1], examples[1:8], [], examples[8:]], list[Tensor]()
    with in_float64(model):
        plain = [model.metrics(part).values() if part else None for part in sets]
        found = measure_each(model, sets, lambda _: nullcontext(asked.append))
    for one, other in zip(plain, found, strict=True):
        assert other.examples == 0 if one is None else other.values() == pytest.approx(one, rel=1e-7, abs=1e-7)
    assert sorted(torch.cat(asked).tolist()) == [0, *[1] * 7, *[3] * 3]


def test_little_of_a_micro_batch_is_padding(measured: tuple[Model, list[Example]]) -> None:
    model, examples = measured
    order = Random(0).choices(range(len(examples)), k=60)
    batches = micro_batches(model, [examples[i] for i in order], most_rows=20)
    assert sorted(i for batch in batches for i in batch) == [*range(60)]
    assert len(batches) < 30 and max(map(len, batches)) <= 20


@pytest.mark.usefixtures(small_micro_batches.__name__)
def test_two_threads_find_what_one_finds(measured: tuple[Model, list[Example]]) -> None:
    model, examples = measured
    with in_float64(model):
        found = []
        for count in (1, 2):
            with on(count):
                found.append(measure_each(model, [examples[:4], examples[4:]]))
                assert at_once(model) == count
    for one, two in zip(*found, strict=True):
        assert two.values() == pytest.approx(one.values(), rel=1e-12)
