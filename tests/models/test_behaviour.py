"""A row's numbers are its own: not its neighbours', whatever the model does with padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from benchmarks.tiny_models import ARCHITECTURES, WORDS, save
from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Example
from fedlora.errors import ModelError
from fedlora.models.behaviour import needs_one_length
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig

TEXT = Schema("text", ("text",))
LABEL = Schema("label", ("text", "label"), ("no", "yes"))
SCHEMAS = {"lm": TEXT, "classify": LABEL}
ALONE = (  # by attention, a state, experts, a convolution over words, and two stacks
    ("gpt2", "lm"),
    ("qwen3_next", "lm"),
    ("llama", "classify"),
    ("mixtral", "classify"),
    ("bert", "classify"),
    ("roberta", "classify"),
    ("convbert", "classify"),
    ("bart", "classify"),
)
Maker = Callable[..., Model]
rows = st.lists(st.integers(1, 20), min_size=2, max_size=6)  # the count of words in each


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    built: dict[tuple[str, str], Model] = {}

    def one(name: str, task: str, side: str = "right") -> Model:
        if (name, task, side) not in built:
            folder = _saved(name, task, tmp_path_factory.mktemp(name), side)
            config = ModelConfig(path=str(folder), max_length=32, device="cpu")
            built[name, task, side] = Model(config, LoRAConfig(rank=2), SCHEMAS[task], seed=1)
        return built[name, task, side]

    return one


def _saved(name: str, task: str, folder: Path, side: str) -> Path:
    from transformers import AutoTokenizer

    save(next(a for a in ARCHITECTURES if a.name == name), task, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    return folder


def _encoded(model: Model, lengths: list[int]) -> list[Example]:
    texts = [" ".join(WORDS[(7 * i + k) % len(WORDS)] for k in range(n)) for i, n in enumerate(lengths)]
    return model.encoder([{"text": text, "label": ("no", "yes")[i % 2]} for i, text in enumerate(texts)])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("name", "task"), ALONE)
@settings(max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(lengths=rows)
def test_a_row_has_the_loss_that_it_has_alone_whatever_is_in_its_batch(
    build: Maker, name: str, task: str, side: str, lengths: list[int]
) -> None:
    model = build(name, task, side)
    model.net.eval()
    examples = _encoded(model, lengths)
    with torch.no_grad():
        alone = {id(e): model.losses(model.encoder.collate([e]))[0] for e in examples}
        for batch in model.encoder.batches(examples, 4):
            found = model.losses(model.encoder.collate(batch))
            assert_close(found, torch.stack([alone[id(e)] for e in batch]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "is_sensitive"), [("convbert", True), ("bert", False)])
def test_a_model_that_reads_its_padding_gets_batches_of_one_length(build: Maker, name: str, is_sensitive: bool) -> None:
    model = build(name, "classify")
    batches = [[len(e["input_ids"]) for e in b] for b in model.encoder.batches(_encoded(model, [3, 9, 3, 5, 9]), 4)]
    assert model.encoder.limits.one_length is is_sensitive
    assert batches == ([[5, 5], [7], [11, 11]] if is_sensitive else [[5, 5, 7, 11], [11]])


def test_a_model_that_sees_both_ways_is_no_causal_language_model(build: Maker) -> None:
    with pytest.raises(ModelError, match=r"XLNetLMHeadModel is no causal language model"):
        build("xlnet", "lm")


def test_a_model_that_draws_its_answers_is_refused(build: Maker) -> None:
    model = build("bert", "classify")
    hook = model.net.base_model.model.bert.register_forward_hook(lambda _m, _x, out: _doubled_at_random(out))
    with pytest.raises(ModelError, match="gives the same text other numbers each time"):
        needs_one_length(model.net, model.encoder)
    hook.remove()


def _doubled_at_random(out: Any) -> Any:
    out.pooler_output = torch.nn.functional.dropout(out.pooler_output, 0.5, training=True)
    return out


def test_a_masked_language_model_is_not_taken_for_a_causal_one(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    _saved("bert", "classify", tmp_path, "right")
    BertForMaskedLM(BertConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="would see what it is to predict"):
        Model(ModelConfig(path=str(tmp_path), device="cpu"), LoRAConfig(rank=2), TEXT, seed=1)


def test_batch_norms_of_the_base_keep_their_statistics_in_training(build: Maker) -> None:
    model = build("bert", "classify")
    norm = torch.nn.BatchNorm1d(3)
    model.net.add_module("norm", norm)
    model.begin_training()
    del model.net.norm
    assert model.net.training and not norm.training
