"""A pass over rows of several clients: the gradient of each row is what autograd finds of that row alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tiny_models
from fedlora.client.stacked.layout import Layout, layout_of
from fedlora.client.stacked.row_pass import NotStackableError, RowPass
from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Example
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support import encoder_decoders
from tests.support.float64 import in_float64
from tests.support.models import FORMS, LABEL, TEXT, make, random_adapter

SENTENCES = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13 w14 w15", "w2 w3 w4"]
PREFERENCE = Schema("preference", ("prompt", "chosen", "rejected"))
RESPONSE = Schema("response", ("prompt", "response"))
NUMBER = Schema("label", ("text", "label"), target="number")
LABELS = Schema("label", ("text", "label"), ("no", "maybe", "yes"), target="labels", separator=" ")
LEARNED: Mapping[str, tuple[str, Schema]] = {  # a model and what it learns
    "a text": ("llama", TEXT),
    "a text, with tied words": ("llama-tied", TEXT),
    "a text, by transposed weights": ("gpt2", TEXT),
    "a class": ("bert", LABEL),
    "a class, at the last token": ("llama-cls", LABEL),
    "a number": ("bert", NUMBER),
    "several labels": ("bert", LABELS),
    "the better answer": ("llama", PREFERENCE),
    "a response": ("llama", RESPONSE),
    "a response, by T5": ("t5", RESPONSE),
    "a response, by BART": ("bart", RESPONSE),
}


def row(i: int, schema: Schema) -> dict[str, Any]:
    texts = {"text": SENTENCES[i], "prompt": SENTENCES[i], "response": SENTENCES[-i], "chosen": SENTENCES[i - 1]}
    labels = {"number": i / 2, "labels": ["no", "yes"][: i % 3]}
    return texts | {"rejected": SENTENCES[i - 2], "label": labels.get(schema.target, ("no", "maybe", "yes")[i % 3])}


def model_of(kind: str, schema: Schema, folder: Path, *targets: str, **settings: Any) -> Model:
    made = encoder_decoders.make if kind in encoder_decoders.KINDS else make
    config = ModelConfig(path=str(made(kind, folder)), max_length=24, device="cpu", **settings)
    return Model(config, LoRAConfig(rank=3, targets=targets), schema, seed=1)


def stacked(model: Model, adapters: Sequence[LoRA], owner: Tensor, examples: list[Example]) -> tuple[Layout, Tensor]:
    """The gradients of these examples, (examples, P), in one pass."""
    layout = layout_of(adapters, "ABRH")
    theta = torch.stack([layout.flat(lora, LoRA(), model.adapter_dtype) for lora in adapters])
    model.set_trainable("")
    with RowPass(model, layout) as rows:
        return layout, rows.gradients(theta, owner, torch.ones(len(examples), dtype=theta.dtype), examples)[0]


def alone(model: Model, adapter: LoRA, example: Example) -> LoRA:
    """The gradient of one example by autograd."""
    model.set_adapter(adapter)
    parameters = model.set_trainable("ABH")
    model.loss(model.encoder.collate([example])).backward()  # type: ignore[no-untyped-call]
    sides = {side: {m: p.grad for m, p in model._sides[side].items()} for side in "ABH"}
    assert all(p.grad is not None for p in parameters)
    return LoRA(**sides)


def distance(model: Model) -> float:
    """The largest difference between a row's gradient in the pass and alone, as a share of the largest number."""
    schema = model.schema
    examples = model.encoder([row(i, schema) for i in range(len(SENTENCES))])
    adapters, owner = [random_adapter(model, i) for i in range(2)], torch.tensor([0, 1, 1, 0, 1])
    model.net.eval()
    layout, found = stacked(model, adapters, owner, examples)
    wanted = [
        layout.flat(alone(model, adapters[int(i)], e), LoRA(), model.adapter_dtype)
        for i, e in zip(owner, examples, strict=True)
    ]
    return float((found - torch.stack(wanted)).abs().max() / torch.stack(wanted).abs().max())


@pytest.mark.parametrize("learned", LEARNED)
def test_each_row_has_the_gradient_that_it_has_alone(learned: str, tmp_path: Path) -> None:
    kind, schema = LEARNED[learned]
    assert distance(model_of(kind, schema, tmp_path)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_every_linear_layer_may_be_adapted(kind: str, tmp_path: Path) -> None:
    schema = RESPONSE if kind == "t5" else TEXT
    with in_float64(model_of(kind, schema, tmp_path, "all-linear")) as model:
        assert distance(model) < 1e-9


def architecture(name: str, folder: Path) -> Model:
    """A classifier of this architecture of transformers, tiny and random."""
    made = next(one for one in tiny_models.ARCHITECTURES if one.name == name)
    config = ModelConfig(path=str(tiny_models.save(made, "classify", folder)), max_length=24, device="cpu")
    return Model(config, LoRAConfig(rank=3), LABEL, seed=1)


def test_a_norm_in_a_head_is_each_rows_own(tmp_path: Path) -> None:
    assert distance(architecture("modernbert", tmp_path)) < 1e-5


@pytest.mark.parametrize("rows", [5, 3])
def test_a_layer_that_sees_tokens_first_is_refused(rows: int, tmp_path: Path) -> None:
    """Also where there are as many rows as tokens, so that one batch alone could not tell."""
    model = architecture("xlnet", tmp_path)
    example = model.encoder([{"text": "w1 w2 w3", "label": "no"}])[0]  # 5 tokens
    with pytest.raises(NotStackableError, match=r"transformer\.layer\.0\.ff\.layer_1 sees 5 rows"):
        stacked(model, [random_adapter(model, 0)], torch.zeros(rows, dtype=torch.int64), [example] * rows)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_over_a_base_in_half_precision_gradients_are_in_float32(kind: str, tmp_path: Path) -> None:
    """They differ by the rounding of what the base computes, which depends on padding."""
    model = model_of(kind, FORMS[kind], tmp_path, dtype="bfloat16")
    assert distance(model) < 5e-2
    layout, found = stacked(model, [random_adapter(model, 0)], torch.zeros(1, dtype=torch.int64), one_example(model))
    assert found.dtype == torch.float32 and layout.trained == found.shape[1]


def one_example(model: Model) -> list[Example]:
    return model.encoder([row(0, model.schema)])
