"""A base in bfloat16 or float16 trains its adapter and its head in float32, and what it delivers loads again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
)

from fedlora import simulate
from fedlora.errors import ModelError
from fedlora.models.model import Model
from fedlora.run.export import export
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import FORMS, batch, logits, make, tokenizer

HALVES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in FORMS}


def half(folder: Path, kind: str, dtype: str) -> Model:
    return Model(ModelConfig(path=str(folder), dtype=dtype, device="cpu"), LoRAConfig(rank=3), FORMS[kind], seed=1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["bert", "llama-cls", "vit"])
def test_a_head_is_trained_in_float32(folders: dict[str, Path], kind: str, dtype: str) -> None:
    """A step that half precision would round away stays, and the scores are those of the base's own type."""
    model, whole = half(folders[kind], kind, dtype), half(folders[kind], kind, "float32")
    assert_close(logits(model, kind), logits(whole, kind), rtol=0.05, atol=0.05)
    head = model.set_trainable("H")
    model.loss(batch(kind)).backward()
    before = [p.detach().clone() for p in head]
    torch.optim.AdamW(head, lr=1e-6, weight_decay=0).step()
    moved = [float((p.detach() - b).abs().max()) for p, b in zip(head, before, strict=True)]
    assert moved == pytest.approx([1e-6] * len(head), rel=0.2)


@pytest.mark.parametrize("dtype", HALVES)
def test_pixels_come_in_the_type_of_the_weights(folders: dict[str, Path], dtype: str, tmp_path: Path) -> None:
    """A vision transformer casts them by itself, a convolution does not."""
    shutil.copytree(folders["vit"], tmp_path, dirs_exist_ok=True)
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_size": 1}
    ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=3)).save_pretrained(tmp_path)
    model, whole = (half(tmp_path, "vit", name) for name in (dtype, "float32"))
    assert_close(logits(model, "vit"), logits(whole, "vit"), rtol=0.05, atol=0.05)


def test_an_architecture_that_cannot_compute_in_half_precision_says_so(tmp_path: Path) -> None:
    """DeBERTa makes a tensor in float32 on its way."""
    tokenizer().save_pretrained(tmp_path)
    small = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    DebertaForSequenceClassification(DebertaConfig(**small, intermediate_size=24)).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"DebertaForSequenceClassification .*cannot compute in model.dtype = bfloat16"
    ):
        half(tmp_path, "bert", "bfloat16")


@pytest.mark.parametrize(("dtype", "privacy"), [("float16", {}), ("bfloat16", {"dp.noise": 0.1})])
def test_a_run_trains_and_delivers(
    folders: dict[str, Path], dtype: str, privacy: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"text": f"w{i % 3} w{i % 3} w{10 + i % 2}", "label": ("no", "maybe", "yes")[i % 3]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model.dtype": dtype, "model.device": "cpu", "lora.rank": 2, "train.lr": 0.02, "train.batch_size": 4}
    run = simulate(
        model=folders["bert"],
        data=tmp_path / "rows.jsonl",
        out=tmp_path / "run",
        strategy="fedex_lora",
        clients=2,
        cohort=2,
        rounds=3,
        progress=False,
        **settings,
        **privacy,
    )
    losses = [record["train_loss"] for record in run.rounds]
    assert privacy or losses[-1] < losses[0]
    export(run.folder, "adapter")  # which verifies what it wrote
    export(run.folder, "merged")
