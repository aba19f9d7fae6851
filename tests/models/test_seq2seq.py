"""An encoder-decoder learns a response to a prompt: what its decoder sees and learns, and that examples do not mix."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedlora.data.schema import Schema
from fedlora.errors import ConfigError, ModelError
from fedlora.models import base_model
from fedlora.models.model import Model
from fedlora.models.peft_files import load_adapter, save_peft
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.encoder_decoders import KINDS, make
from tests.support.models import make as make_decoder
from tests.support.models import random_adapter

SCHEMA = Schema("response", ("prompt", "response"))
ROWS = [
    {"prompt": "w1 w2", "response": "w3"},
    {"prompt": "w4 w5 w6 w7 w8 w9", "response": "w10 w11 w12 w13"},
    {"prompt": "w14", "response": "w15 w16 w17 w18 w19 w20"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def build(folder: Path, **config: Any) -> Model:
    return Model(ModelConfig(path=str(folder), **config), LoRAConfig(rank=3), SCHEMA, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_transformers_own_over_prompt_and_response(folders: dict[str, Path], kind: str) -> None:
    model = build(folders[kind])
    plain = base_model.load_base_model(ModelConfig(path=str(folders[kind])), SCHEMA, seed=1)[0].eval()
    for row in ROWS:
        ids, labels = (model.processor(row[name], return_tensors="pt")["input_ids"] for name in ("prompt", "response"))
        wanted = float(plain(input_ids=ids, labels=labels).loss.detach())
        assert model.metrics(model.encoder([row])).values()["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_examples_loss_is_the_same_alone_and_beside_others(folders: dict[str, Path], kind: str) -> None:
    model = build(folders[kind])
    model.set_adapter(random_adapter(model, 1))
    model.net.eval()
    examples = model.encoder(ROWS)
    with torch.no_grad():
        alone = torch.cat([model.losses(model.encoder.collate([e])) for e in examples])
        together = model.losses(model.encoder.collate(examples))
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_delivered_adapter_gives_the_trained_scores(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = build(folders[kind])
    model.set_adapter(random_adapter(model, 1))
    batch = model.encoder.collate(model.encoder(ROWS))
    model.net.eval()
    with torch.no_grad():
        wanted = model.net(**{k: v for k, v in batch.items() if k != "labels"}).logits
        save_peft(model, model.get_adapter(), tmp_path / "adapter")
        fresh = load_adapter(ModelConfig(path=str(folders[kind])), SCHEMA, tmp_path / "adapter").eval()
        got = fresh(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_response_that_is_cut_does_not_teach_the_model_to_stop(folders: dict[str, Path]) -> None:
    model = build(folders["t5"], max_length=8)
    short, cut = model.encoder([ROWS[0], {"prompt": "w1", "response": " ".join(f"w{i}" for i in range(20))}])
    end = model.processor.eos_token_id
    assert short["labels"][-1] == end and end not in cut["labels"] and len(cut["labels"]) == 8


def test_an_encoder_decoder_without_prompts_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="learns a response to a prompt"):
        Model(ModelConfig(path=str(folders["t5"])), LoRAConfig(rank=3), Schema("text", ("text",)), seed=1)


def test_a_decoder_is_no_model_for_sequence_to_sequence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no encoder beside its decoder"):
        build(make_decoder("gpt2", tmp_path), task="seq2seq")


WORDS = st.sampled_from(["w1", "w2", "unknown", "</s>", "<s>", "[PAD]", "\ud83d", "\u00e9", "\n", ""])
TEXTS = st.lists(WORDS, max_size=20).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=4))
def test_any_texts_are_learned_each_by_itself(folders: dict[str, Path], pairs: list[tuple[str, str]]) -> None:
    model = cached(folders["bart"])
    rows = [{"prompt": prompt, "response": f"w3 {response}"} for prompt, response in pairs]
    examples = model.encoder(rows)
    with torch.no_grad():
        alone = torch.cat([model.losses(model.encoder.collate([e])) for e in examples])
        together = model.losses(model.encoder.collate(examples))
    assert len(examples) == len(rows) and bool(torch.isfinite(alone).all())
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@cache
def cached(folder: Path) -> Model:
    model = build(folder, max_length=16)
    model.net.eval()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_beyond_the_positions_is_refused_and_one_within_them_is_cut_to(
    folders: dict[str, Path], kind: str
) -> None:
    """All but T5, whose positions are relative, have 40."""
    long = {"prompt": "w1 " * 60, "response": "w2 " * 60}
    model = build(folders[kind], max_length=128)
    if kind == "t5":
        assert model.metrics(model.encoder([long])).values()["loss"] > 0
        return
    with pytest.raises(ConfigError, match="max_length = 128 is above the 40 positions of the model"):
        model.encoder([long])
    cut = build(folders[kind], max_length=40)
    assert cut.metrics(cut.encoder([long])).values()["loss"] > 0
