"""A base model whose scores are no numbers is refused before the start, with what to do about it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.errors import ModelError
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import TEXT, make, tokenizer

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16 with activations beyond 65504, as T5 and Gemma have."""
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=2, pad_token_id=0))
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight.mul_(3e5)
        net.model.layers[0].mlp.up_proj.weight.mul_(5e3)
    net.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def build(folder: Path, dtype: Any) -> Model:
    return Model(ModelConfig(path=str(folder), dtype=dtype), LoRAConfig(rank=2), TEXT, seed=0)


def test_activations_that_overflow_float16_ask_for_another_type(overflowing: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model.dtype = float16: .* too large for it; set model.dtype = bfloat16 or float32"
    ):
        build(overflowing, "float16")
    assert build(overflowing, "bfloat16").coverage.layers == 1


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    net = LlamaForCausalLM.from_pretrained(make("llama", tmp_path))
    with torch.no_grad():
        net.model.norm.weight[3] = torch.nan
    net.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the weights of model.norm.weight in the base model hold nan"):
        build(tmp_path, "float32")
