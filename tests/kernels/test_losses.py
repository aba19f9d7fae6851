"""Losses over learned tokens alone are the model's own, with their gradients, for every way to make scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedlora.checks.small_models import small_model
from fedlora.data.schema import Schema
from fedlora.kernels import losses
from fedlora.kernels.losses import example_losses, metrics_by_set
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from fedlora.seeds import seeded
from tests.support import encoder_decoders
from tests.support.float64 import in_float64
from tests.support.models import make, random_adapter, tokenizer

TURNS = Schema("response", ("prompt", "response"))
TEXT = [{"text": "w4 w5 w6 w7"}, {"text": "w8 w9 w10"}, {"text": "w4 w11"}]
ANSWERS = [{"prompt": "w4 w5 w6 w7", "response": "w8 w9"}, {"prompt": "w5", "response": "w10 w11 w12"}]
CHOICES = [
    {"prompt": "w1 w2 w3", "chosen": "w4 w5", "rejected": "w6 w7 w8"},
    {"prompt": "w9", "chosen": "w4 w4 w5 w10", "rejected": "w11"},
]


def load(folder: Path, schema: Schema, dtype: Any = "float32") -> Model:
    config = ModelConfig(path=str(folder), max_length=24, device="cpu", dtype=dtype)
    return Model(config, LoRAConfig(rank=2), schema, seed=1)


def text(folder: Path) -> tuple[Model, list[Any]]:
    model = small_model("gpt2").model
    model.set_adapter(random_adapter(model, 1, rank=2))  # another test may have left it one that diverged
    return model, model.encoder([{"text": " ".join(f"w{i}" for i in range(n))} for n in (3, 8, 5)])


def answers(folder: Path) -> tuple[Model, list[Any]]:
    model = load(make("llama", folder), TURNS)
    return model, model.encoder(ANSWERS)


def preferences(folder: Path) -> tuple[Model, list[Any]]:
    model = load(make("llama", folder), Schema("preference", ("prompt", "chosen", "rejected")))
    return model, model.encoder(CHOICES)


def t5(folder: Path) -> tuple[Model, list[Any]]:
    model = load(encoder_decoders.make("t5", folder), TURNS)
    return model, model.encoder(ANSWERS)


def bart(folder: Path) -> tuple[Model, list[Any]]:  # adds a bias to what its output layer returns
    model = load(encoder_decoders.make("bart", folder), TURNS)
    return model, model.encoder(ANSWERS)


def gemma(folder: Path) -> tuple[Model, list[Any]]:  # bounds what its output layer returns
    wide: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    Gemma2ForCausalLM(Gemma2Config(vocab_size=64, **wide, **heads)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model = load(folder, TURNS)
    return model, model.encoder(ANSWERS)


def classes(folder: Path) -> tuple[Model, list[Any]]:
    small = small_model("bert")
    small.model.set_adapter(random_adapter(small.model, 1, rank=2))
    return small.model, list(small.clients[0].heldout)


LEARNED, OTHERS = [text, answers, preferences, t5], [bart, gemma, classes]
Make = Callable[[Path], tuple[Model, list[Any]]]


def with_gradients(model: Model, found: Tensor) -> list[Tensor]:
    weights = torch.arange(1.0, len(found) + 1, dtype=found.dtype)
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), parameters)]


def plain_losses(model: Model, batch: dict[str, Tensor], examples: int) -> Tensor:
    scores, targets = model.logits(batch)
    return model.objective.losses(scores, targets).view(examples, -1).sum(1)


@pytest.mark.parametrize("make_model", [*LEARNED, *OTHERS])
def test_losses_and_their_gradients_are_the_models_own(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2)
    monkeypatch.setattr(losses, "SCORES", {})
    model, examples = make_model(tmp_path)
    batch = model.encoder.collate(examples)
    with in_float64(model):
        model.net.eval()
        model.set_trainable("ABH")
        plain = with_gradients(model, plain_losses(model, batch, len(examples)))
        quick = with_gradients(model, example_losses(model, batch))
    torch.testing.assert_close(quick, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make_model", [*LEARNED, *OTHERS])
def test_metrics_of_sets_that_share_a_batch_are_the_models_own(make_model: Make, tmp_path: Path) -> None:
    model, examples = make_model(tmp_path)
    model.net.eval()
    sets = [examples[:1], examples[1:]]
    found = metrics_by_set(model, model.encoder.collate(examples), [len(own) for own in sets])
    for metrics, own in zip(found, sets, strict=True):
        plain = model.metrics(own)
        assert (metrics.examples, metrics.targets, metrics.correct) == (plain.examples, plain.targets, plain.correct)
        assert metrics.values() == pytest.approx(plain.values(), rel=1e-5)


@pytest.mark.parametrize(("make_model", "alone"), [*((m, True) for m in LEARNED), *((m, False) for m in OTHERS)])
def test_only_scores_that_the_output_layer_returns_are_computed_so(
    make_model: Make, alone: bool, tmp_path: Path
) -> None:
    model, examples = make_model(tmp_path)
    layer = model.net.get_base_model().get_output_embeddings() or model.net.get_base_model().classifier
    batch = model.encoder.collate(examples)
    seen: list[bool] = []  # whether the layer gave every row its scores, and not the states of learned tokens
    hook = layer.register_forward_hook(lambda _m, _x, y: seen.append(len(y) == len(batch["labels"])))
    example_losses(model, batch)
    hook.remove()
    assert any(seen) != alone


def test_a_batch_without_learned_tokens_has_no_loss(tmp_path: Path) -> None:
    model, examples = answers(tmp_path)
    batch = model.encoder.collate(examples)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = example_losses(model, batch)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0]


def test_in_half_precision_losses_are_summed_in_float32(tmp_path: Path) -> None:
    model = load(make("llama", tmp_path), TURNS, dtype="bfloat16")
    batch = model.encoder.collate(model.encoder(ANSWERS))
    with seeded(0), torch.no_grad():
        found, plain = example_losses(model, batch), plain_losses(model, batch, len(ANSWERS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=1e-2)


def test_a_network_that_is_refused_has_drawn_no_dropout_for_it(tmp_path: Path) -> None:
    """So a run that is resumed, whose process finds this out anew, goes on with the same bits."""
    model, examples = bart(tmp_path)
    batch, found = model.encoder.collate(examples), list[Tensor]()
    model.begin_training()
    for _ in range(2):
        with seeded(0), torch.no_grad():
            found.append(example_losses(model, batch))
    assert torch.equal(*found)


def test_a_network_that_takes_its_scores_apart_is_computed_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = answers(tmp_path)
    batch, forward = model.encoder.collate(examples), model.net.forward

    def without_the_last_word(**inputs: Any) -> Any:
        found = forward(**inputs)
        found.logits = found.logits[:, :, :-1]  # rows, tokens, words
        return found

    monkeypatch.setattr(model.net, "forward", without_the_last_word)
    model.net.eval()
    torch.testing.assert_close(example_losses(model, batch), plain_losses(model, batch, len(examples)))
