"""A model wears what it is given, and delivers what it wore."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from fedlora import base
from fedlora.config import LoRAConfig, ModelConfig
from fedlora.data import Form
from fedlora.errors import ModelError, StrategyError
from fedlora.lora import LoRA, join
from fedlora.model import Model
from tests.models import FORMS, make

Maker = Callable[..., Model]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in FORMS}


@pytest.fixture
def build(folders: dict[str, Path]) -> Maker:
    def one(kind: str, form: Form | None = None, **lora: Any) -> Model:
        return Model(ModelConfig(path=str(folders[kind])), LoRAConfig(rank=3, **lora), form or FORMS[kind], seed=1)

    return one


def batch(kind: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    if kind == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=g), "labels": torch.tensor([0, 1, 2, 0])}
    ids = torch.randint(4, 64, (4, 12), generator=g)
    labels = torch.tensor([0, 1, 2, 0]) if FORMS[kind].labels else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def logits(model: Model, kind: str) -> torch.Tensor:
    model.net.eval()
    with torch.no_grad():
        return model.logits(batch(kind))[0]


def stirred(model: Model, seed: int, rank: int = 3) -> LoRA:
    """A random adapter that fits the model, at any rank."""
    g = torch.Generator().manual_seed(seed)
    like = model.read()
    return LoRA(
        {m: torch.randn(rank, a.shape[1], generator=g) for m, a in like.A.items()},
        {m: 0.1 * torch.randn(b.shape[0], rank, generator=g) for m, b in like.B.items()},
        {m: h + 0.1 * torch.randn(h.shape, generator=g) for m, h in like.H.items()},
    )


@pytest.mark.parametrize("kind", FORMS)
def test_it_wears_what_it_is_given(build: Maker, kind: str) -> None:
    model = build(kind)
    given = stirred(model, 1)
    model.write(given)
    assert_close(vars(model.read()), vars(given), rtol=0, atol=0)
    assert bool(model.read().H) == bool(FORMS[kind].labels)


@pytest.mark.parametrize("kind", FORMS)
def test_an_offset_is_the_same_in_the_weights_and_beside_them(build: Maker, kind: str) -> None:
    """Linear and GPT-2's Conv1D: folded, as a branch of its own, and as a wider adapter."""
    model, start = build(kind), None
    start, parts = stirred(model, 1), (stirred(model, 2, rank=2), stirred(model, 3, rank=4))
    model.write(join(*parts, start).over(start))
    wanted = logits(model, kind)
    model.write(start, parts)
    assert_close(logits(model, kind), wanted, rtol=1e-4, atol=1e-5)
    model.write(start, ())
    assert not torch.allclose(logits(model, kind), wanted, atol=1e-3)
    model.folds = False
    model.write(start, parts)
    assert_close(logits(model, kind), wanted, rtol=1e-4, atol=1e-5)


def test_taking_an_offset_off_leaves_the_pretrained_weights(build: Maker) -> None:
    model = build("gpt2")
    start, before = model.read(), logits(build("gpt2"), "gpt2")
    model.write(start, (stirred(model, 2),))
    model.write(start)
    assert torch.equal(logits(model, "gpt2"), before)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("options", [{"alpha": 5.0}, {"alpha": 4.0, "rslora": True}], ids=["alpha", "rslora"])
def test_the_delivered_adapter_gives_the_trained_logits(
    build: Maker, folders: dict[str, Path], kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """At another rank than the run's, loaded by PEFT on a base that has seen nothing of us."""
    model = build(kind, **options)
    trained = stirred(model, 4, rank=7)
    model.save(trained, tmp_path)
    model.write(trained)
    bare, *_ = base.load(ModelConfig(path=str(folders[kind])), FORMS[kind], seed=99)
    loaded: Any = PeftModel.from_pretrained(bare, str(tmp_path)).eval()
    inputs = {k: v for k, v in batch(kind).items() if k != "labels"}
    with torch.no_grad():
        got = loaded(**inputs).logits
    wanted = logits(model, kind)
    assert_close(got if FORMS[kind].labels else got[:, :-1].flatten(0, 1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_delivered_adapter_opens_as_it_was(build: Maker, kind: str, tmp_path: Path) -> None:
    model = build(kind, alpha=5.0)
    trained = stirred(model, 4, rank=6)
    model.save(trained, tmp_path)
    assert_close(vars(build(kind, alpha=5.0).open(tmp_path)), vars(trained), rtol=1e-6, atol=1e-7)


def test_ranks_that_differ_by_module_are_delivered(build: Maker, tmp_path: Path) -> None:
    model = build("llama")
    wide, narrow = stirred(model, 4, rank=6), stirred(model, 5, rank=2)
    first = next(iter(wide.A))
    mixed = LoRA(wide.A | {first: narrow.A[first]}, wide.B | {first: narrow.B[first]})
    model.save(mixed, tmp_path)
    assert_close(vars(build("llama").open(tmp_path)), vars(mixed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", FORMS)
def test_gradients_reach_the_trained_sides_alone(build: Maker, kind: str) -> None:
    model = build(kind)
    model.write(stirred(model, 1))
    chosen = model.trains("BH")
    model.loss(batch(kind)).backward()
    graded = {id(p) for p in model.net.parameters() if p.grad is not None}
    assert graded == {id(p) for p in chosen}
    assert len(chosen) == len(model.read().B) + len(model.read().H)


def test_alpha_and_rank_make_the_scale(build: Maker) -> None:
    assert build("llama", alpha=6.0).scale == pytest.approx(2.0)
    assert build("llama", alpha=6.0, rslora=True).scale == pytest.approx(6 / 3**0.5)


def test_the_same_seed_makes_the_same_adapter_and_head(build: Maker) -> None:
    form = replace(FORMS["bert"], labels=("a", "b", "c", "d", "e"))  # a head the checkpoint does not hold
    torch.manual_seed(123)
    one = build("bert", form).read()
    torch.manual_seed(456)
    assert_close(vars(build("bert", form).read()), vars(one), rtol=0, atol=0)
    assert one.H["classifier.weight"].shape == (5, 24)


def test_a_half_precision_base_keeps_its_adapter_and_offset_in_float32(folders: dict[str, Path]) -> None:
    config = ModelConfig(path=str(folders["llama"]), dtype="bfloat16")
    model = Model(config, LoRAConfig(rank=3), FORMS["llama"], seed=1)
    start, small = model.read(), stirred(model, 2)
    assert {a.dtype for a in start.A.values()} == {torch.float32}
    before = logits(model, "llama")
    model.write(start, (small,))
    weights = [layer.get_base_layer().weight for layer in model.adapted.values()]
    assert not model.folds and {w.dtype for w in weights} == {torch.bfloat16}
    assert not torch.allclose(logits(model, "llama"), before, atol=1e-3)


def test_metrics_count_every_target_once(build: Maker) -> None:
    model = build("llama")
    examples = [{"input_ids": t, "labels": t} for n in (5, 9, 3) for t in [torch.arange(4, 4 + n)]]
    one, many = model.metrics(examples, batch_size=1), model.metrics(examples, batch_size=3)
    assert one.targets == many.targets == 4 + 8 + 2 and one.examples == 3
    assert one.values() == pytest.approx(many.values(), rel=1e-5)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"rank": 25}, "lora.rank = 25 is above the smaller dimension of .*choose a rank of at most 12"),
        ({"targets": ("q_prog",)}, 'no module "q_prog"; did you mean "q_proj"'),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(folders: dict[str, Path], lora: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Model(ModelConfig(path=str(folders["llama"])), LoRAConfig(**({"rank": 3} | lora)), FORMS["llama"], 0)


@pytest.mark.parametrize("path", ["./nowhere", "no-such/model-on-any-hub"])
def test_a_model_that_cannot_be_had_is_one_sentence(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=path):
        Model(ModelConfig(path=path), LoRAConfig(), FORMS["llama"], 0)


def test_matrices_of_the_wrong_shape_are_refused_by_name(build: Maker) -> None:
    model = build("gpt2")
    good = stirred(model, 1)
    first = next(iter(good.B))
    with pytest.raises(StrategyError, match=f"B of {first}"):
        model.write(LoRA(good.A, good.B | {first: good.B[first][:-1]}))
    with pytest.raises(StrategyError, match="have different ranks"):
        model.write(LoRA(good.A, good.B | {first: good.B[first][:, :-1]}))
