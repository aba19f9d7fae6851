"""The base computes in the precision that a run asks for, and nothing else does."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedlora.checks.small_models import SmallModel, small_model
from fedlora.config import build
from fedlora.errors import ConfigError
from fedlora.kernels import precision
from fedlora.kernels.losses import example_losses
from fedlora.kernels.precision import set_precision, speed_of_bfloat16
from fedlora.models.model import Model
from fedlora.privacy.per_sample_gradients import OnePassGradients
from tests.support.models import random_adapter


@pytest.fixture(params=["llama", "bert"])
def small(request: Any) -> Iterator[SmallModel]:
    found = small_model(request.param)
    model = Model(found.config, found.lora, found.schema, seed=0)
    model.set_adapter(random_adapter(model, 1))
    yield replace(found, model=model)


def test_mixed_products_are_float32_but_for_the_rounding_of_bfloat16(small: SmallModel) -> None:
    model, batch = small.model, small.batch
    model.net.eval()
    parameters = model.set_trainable("AB")
    plain = [model.loss(batch).detach(), *torch.autograd.grad(model.loss(batch), parameters)]
    set_precision(model, "mixed")
    parameters = model.set_trainable("AB")
    mixed = [model.loss(batch).detach(), *torch.autograd.grad(model.loss(batch), parameters)]
    for one, other in zip(mixed, plain, strict=True):
        assert one.dtype == torch.float32
        assert 0 < float((one - other).norm()) < 3e-2 * float(other.norm())


def test_mixed_products_are_those_of_the_frozen_layers_alone(small: SmallModel) -> None:
    model, seen = small.model, []
    trained = {id(p) for p in model.set_trainable("ABH")}
    set_precision(model, "mixed")
    with model.products():
        for module in model.net.modules():
            if isinstance(module, nn.Linear):
                seen.append(("forward" in module.__dict__) != (id(module.weight) in trained))
    assert all(seen)
    assert not any("forward" in m.__dict__ for m in model.net.modules())


def test_an_offset_stays_beside_weights_that_are_rounded(small: SmallModel) -> None:
    model = small.model
    set_precision(model, "mixed")
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    plain = model.logits(small.batch)[0]
    model.set_adapter(model.get_adapter(), (random_adapter(model, 2),))
    assert all(p.equal(before[name]) for name, p in model.net.named_parameters())
    assert not model.logits(small.batch)[0].equal(plain)


def test_losses_over_learned_tokens_are_of_mixed_products_too() -> None:
    found = small_model("llama")
    model = Model(found.config, found.lora, found.schema, seed=0)
    set_precision(model, "mixed")
    model.net.eval()
    scores, targets = model.logits(found.batch)
    plain = model.objective.losses(scores, targets).view(len(found.batch["labels"]), -1).sum(1)
    torch.testing.assert_close(example_losses(model, found.batch), plain, rtol=1e-3, atol=1e-3)


def test_gradients_of_single_examples_pass_through_mixed_products(small: SmallModel) -> None:
    model, examples = small.model, small.clients[0].heldout
    set_precision(model, "mixed")
    model.net.eval()
    parameters = model.set_trainable("AB")
    with OnePassGradients(model, parameters) as gradients:
        by_example = [g.sum(0) for g in gradients(examples)]
    whole = torch.autograd.grad(model.losses(model.encoder.collate(examples)).sum(), parameters)
    for one, other in zip(by_example, whole, strict=True):
        assert float((one - other).norm()) < 1e-2 * float(other.norm()) + 1e-6


@pytest.mark.parametrize(("speed", "notes"), [(0.125, 1), (1.5, 0)])
def test_a_run_is_told_where_bfloat16_is_slower(
    small: SmallModel, speed: float, notes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "speed_of_bfloat16", lambda _: speed)
    before = small.model.notes
    set_precision(small.model, "mixed")
    added = small.model.notes[len(before) :]
    assert len(added) == notes
    assert all("8.0 times as long" in note for note in added)


def test_the_speed_of_bfloat16_is_measured_once_for_a_shape() -> None:
    net = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    assert 0 < speed_of_bfloat16(net) == speed_of_bfloat16(net)
    assert speed_of_bfloat16(nn.Identity()) == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "mixed", "model.dtype": "bfloat16"},
        {"precision": "fp32", "model.dtype": "bfloat16"},
        {"precision": "bf16", "model.dtype": "float16"},
        {"precision": "mixed", "model.quantize": "8bit"},
        {"precision": "mixed", "dp.epsilon": 8.0},
        {"precision": "bf16", "dp.noise": 1.0},
    ],
)
def test_what_contradicts_a_precision_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"precision = {settings['precision']} and"):
        build(settings)


@pytest.mark.parametrize("settings", [{"precision": "fp32", "dp.epsilon": 8.0}, {"precision": "mixed"}, {}])
def test_what_agrees_with_a_precision_is_taken(settings: dict[str, Any]) -> None:
    assert build(settings).precision == settings.get("precision", "auto")
