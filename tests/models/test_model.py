"""A model has the adapter that it is given, and saves the adapter that it has."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from fedlora.data.schema import Schema
from fedlora.errors import ModelError, StrategyError
from fedlora.lora import LoRA, delta, join
from fedlora.models import base_model
from fedlora.models.model import Model
from fedlora.models.peft_files import load_peft, save_peft
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import FORMS, batch, computed, logits, make, plain_logits, random_adapter

Maker = Callable[..., Model]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in FORMS}


@pytest.fixture
def build(folders: dict[str, Path]) -> Maker:
    def one(kind: str, schema: Schema | None = None, **lora: Any) -> Model:
        return Model(ModelConfig(path=str(folders[kind])), LoRAConfig(rank=3, **lora), schema or FORMS[kind], seed=1)

    return one


def cored(model: Model, seed: int, rank: int = 3, heads: int = 1) -> LoRA:
    """A random adapter with a core in every module, in blocks if it has several heads."""
    g, k = torch.Generator().manual_seed(seed), rank // heads
    blocks = {m: 0.5 * torch.randn(heads, k, k, generator=g) for m in model.adapted}
    cores = {m: own if heads > 1 else own[0] for m, own in blocks.items()}
    return LoRA(R=cores).over(random_adapter(model, seed, rank))


def dense(model: Model, seed: int) -> LoRA:
    """A random dense matrix for every module."""
    g = torch.Generator().manual_seed(seed)
    layers = model.adapted.items()
    return LoRA(D={m: 0.1 * torch.randn(x.out_features, x.in_features, generator=g) for m, x in layers})


@pytest.mark.parametrize("kind", FORMS)
def test_it_has_the_adapter_that_it_is_given(build: Maker, kind: str) -> None:
    model = build(kind)
    given = random_adapter(model, 1)
    model.set_adapter(given)
    assert_close(vars(model.get_adapter()), vars(given), rtol=0, atol=0)
    assert bool(model.get_adapter().H) == bool(FORMS[kind].labels)


@pytest.mark.parametrize("kind", FORMS)
def test_an_offset_is_the_same_in_the_weights_and_beside_them(build: Maker, kind: str) -> None:
    """Linear and GPT-2's Conv1D: folded, as a branch of its own, and as a wider adapter."""
    model, start = build(kind), None
    start, parts = random_adapter(model, 1), (random_adapter(model, 2, rank=2), random_adapter(model, 3, rank=4))
    model.set_adapter(join(*parts, start).over(start))
    wanted = logits(model, kind)
    model.set_adapter(start, parts)
    assert_close(logits(model, kind), wanted, rtol=1e-3, atol=1e-4)
    model.set_adapter(start, ())
    assert not torch.allclose(logits(model, kind), wanted, atol=1e-3)
    model.offset.folds = False
    model.set_adapter(start, parts)
    assert_close(logits(model, kind), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("folds", [True, False], ids=["folded", "beside"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_module_computes_the_dense_formula(build: Maker, kind: str, folds: bool) -> None:
    """W + s (g B R A + an offset with factors, a core and a dense matrix) where s = alpha / r and g is a gain."""
    model = build(kind, alpha=5.0)
    pretrained = {m: computed(layer) for m, layer in model.adapted.items()}
    model.offset.folds = folds
    adapter, parts = (
        cored(model, 1, rank=2),
        (cored(model, 2, rank=4), dense(model, 3), cored(model, 4, rank=6, heads=2)),
    )
    first, *others = model.adapted
    model.set_adapter(adapter, parts, {first: 1.5})
    for m in (first, *others):
        offset = sum(delta(part)[m] for part in parts)
        wanted = pretrained[m] + 5 / 3 * ((1.5 if m == first else 1.0) * delta(adapter)[m] + offset)
        assert_close(computed(model.adapted[m]), wanted, rtol=1e-4, atol=1e-5)


def test_a_gain_and_a_core_hold_for_one_write(build: Maker) -> None:
    model = build("bert")
    adapter = random_adapter(model, 1)
    model.set_adapter(adapter)
    before = logits(model, "bert")
    model.set_adapter(cored(model, 2), (), dict.fromkeys(model.adapted, 2.0))
    assert not torch.allclose(logits(model, "bert"), before, atol=1e-3)
    model.set_adapter(adapter)
    assert torch.equal(logits(model, "bert"), before) and not model.get_adapter().R


def test_a_core_is_trained_and_read(build: Maker) -> None:
    model = build("llama")
    adapter = cored(model, 1)
    model.set_adapter(adapter)
    assert_close(vars(model.get_adapter()), vars(adapter), rtol=0, atol=0)
    trained = model.set_trainable("R")
    model.loss(batch("llama")).backward()
    assert len(trained) == len(adapter.R) and all(p.grad is not None and p.grad.any() for p in trained)
    assert {id(p) for p in model.net.parameters() if p.grad is not None} == {id(p) for p in trained}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_core_in_blocks_computes_and_learns_as_the_whole_one_with_zeros_beside_them(build: Maker, kind: str) -> None:
    model = build(kind)
    blocks = cored(model, 1, rank=6, heads=3)
    whole = LoRA(R={m: torch.block_diag(*core) for m, core in blocks.R.items()}).over(blocks)
    seen = []
    for given in (blocks, whole):
        model.set_adapter(given)
        assert_close(vars(model.get_adapter()), vars(given), rtol=0, atol=0)
        trained = model.set_trainable("R")
        model.loss(batch(kind)).backward()
        seen.append((logits(model, kind), [p.grad for p in trained]))
    (ours, gradients), (wanted, dense) = seen
    assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    cut = [torch.stack([g[i : i + 2, i : i + 2] for i in (0, 2, 4)]) for g in dense if g is not None]
    assert_close(gradients, cut, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_read_has_every_heads_scale_in_it_and_the_next_adapter_has_none(build: Maker, heads: int) -> None:
    model = build("llama")
    start = cored(model, 1, rank=3, heads=heads)
    model.set_adapter(start, scales=True)
    scales, cores = model.set_trainable("S"), model.set_trainable("R")
    assert {s.shape for s in scales} == {(heads,)} and all(bool((s == 1).all()) for s in scales)
    assert_close(vars(model.get_adapter()), vars(start), rtol=0, atol=0)
    with torch.no_grad():
        for s, core in zip(scales, cores, strict=True):
            s.mul_(torch.arange(2.0, 2 + heads))
            core.add_(0.1)
    trained = logits(model, "llama")
    read = model.get_adapter()
    model.set_adapter(read)
    assert_close(logits(model, "llama"), trained, rtol=1e-4, atol=1e-5)
    assert not model.set_trainable("S")


def test_attaching_a_core_draws_nothing(build: Maker) -> None:
    model = build("llama")
    before = torch.random.get_rng_state()
    model.set_adapter(cored(model, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_adapter_with_a_dense_side_is_loaded_whole(build: Maker) -> None:
    model = build("gpt2")
    adapter, side = random_adapter(model, 1), dense(model, 2)
    model.set_adapter(join(adapter, side).over(adapter))
    wanted = logits(model, "gpt2")
    model.set_adapter(side.over(adapter))
    assert_close(logits(model, "gpt2"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cores_and_dense_sides_are_delivered_as_factors_of_at_most_full_rank(
    build: Maker, folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    model = build(kind, alpha=5.0)
    trained = dense(model, 2).over(cored(model, 1, rank=7))
    save_peft(model, trained, tmp_path)
    model.set_adapter(trained)
    bare, *_ = base_model.load_base_model(ModelConfig(path=str(folders[kind])), FORMS[kind], seed=99)
    loaded: Any = PeftModel.from_pretrained(bare, str(tmp_path))
    assert_close(plain_logits(loaded, kind), logits(model, kind), rtol=1e-5, atol=1e-5)
    layers = model.adapted.values()
    full = [min(layer.in_features, layer.out_features) for layer in layers]
    assert [a.shape[0] for a in load_peft(model, tmp_path).A.values()] == full


def test_taking_an_offset_off_leaves_the_pretrained_weights(build: Maker) -> None:
    model = build("gpt2")
    start, before = model.get_adapter(), logits(build("gpt2"), "gpt2")
    model.set_adapter(start, (random_adapter(model, 2),))
    model.set_adapter(start)
    assert torch.equal(logits(model, "gpt2"), before)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("options", [{"alpha": 5.0}, {"alpha": 4.0, "rslora": True}], ids=["alpha", "rslora"])
def test_the_delivered_adapter_gives_the_trained_logits(
    build: Maker, folders: dict[str, Path], kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """At another rank than the run's, loaded by PEFT on a base that has seen nothing of us."""
    model = build(kind, **options)
    trained = random_adapter(model, 4, rank=7)
    save_peft(model, trained, tmp_path)
    model.set_adapter(trained)
    bare, *_ = base_model.load_base_model(ModelConfig(path=str(folders[kind])), FORMS[kind], seed=99)
    loaded: Any = PeftModel.from_pretrained(bare, str(tmp_path))
    assert_close(plain_logits(loaded, kind), logits(model, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_delivered_adapter_opens_as_it_was(build: Maker, kind: str, tmp_path: Path) -> None:
    model = build(kind, alpha=5.0)
    trained = random_adapter(model, 4, rank=6)
    save_peft(model, trained, tmp_path)
    assert_close(vars(load_peft(build(kind, alpha=5.0), tmp_path)), vars(trained), rtol=1e-6, atol=1e-7)


def test_ranks_that_differ_by_module_are_delivered(build: Maker, tmp_path: Path) -> None:
    model = build("llama")
    wide, narrow = random_adapter(model, 4, rank=6), random_adapter(model, 5, rank=2)
    first = next(iter(wide.A))
    mixed = LoRA(wide.A | {first: narrow.A[first]}, wide.B | {first: narrow.B[first]})
    save_peft(model, mixed, tmp_path)
    assert_close(vars(load_peft(build("llama"), tmp_path)), vars(mixed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", FORMS)
def test_gradients_reach_the_trained_sides_alone(build: Maker, kind: str) -> None:
    model = build(kind)
    model.set_adapter(random_adapter(model, 1))
    chosen = model.set_trainable("BH")
    model.loss(batch(kind)).backward()
    graded = {id(p) for p in model.net.parameters() if p.grad is not None}
    assert graded == {id(p) for p in chosen}
    assert len(chosen) == len(model.get_adapter().B) + len(model.get_adapter().H)


def test_alpha_and_rank_make_the_scale(build: Maker) -> None:
    for model, s in (build("llama", alpha=6.0), 2.0), (build("llama", alpha=6.0, rslora=True), 6 / 3**0.5):
        assert model.scales == pytest.approx(dict.fromkeys(model.adapted, s))


def test_the_same_seed_makes_the_same_adapter_and_head(build: Maker) -> None:
    schema = replace(FORMS["bert"], labels=("a", "b", "c", "d", "e"))  # a head the checkpoint does not hold
    torch.manual_seed(123)
    one = build("bert", schema).get_adapter()
    torch.manual_seed(456)
    assert_close(vars(build("bert", schema).get_adapter()), vars(one), rtol=0, atol=0)
    assert one.H["classifier.weight"].shape == (5, 24)


def test_a_half_precision_base_keeps_its_adapter_and_offset_in_float32(folders: dict[str, Path]) -> None:
    config = ModelConfig(path=str(folders["llama"]), dtype="bfloat16")
    model = Model(config, LoRAConfig(rank=3), FORMS["llama"], seed=1)
    start, small = model.get_adapter(), random_adapter(model, 2)
    assert {a.dtype for a in start.A.values()} == {torch.float32}
    before = logits(model, "llama")
    model.set_adapter(start, (small,))
    weights = [layer.get_base_layer().weight for layer in model.adapted.values()]
    assert not model.offset.folds and {w.dtype for w in weights} == {torch.bfloat16}
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
    good = random_adapter(model, 1)
    first = next(iter(good.B))
    with pytest.raises(StrategyError, match=f"B of {first}"):
        model.set_adapter(LoRA(good.A, good.B | {first: good.B[first][:-1]}))
    with pytest.raises(StrategyError, match="have different ranks"):
        model.set_adapter(LoRA(good.A, good.B | {first: good.B[first][:, :-1]}))
    for wrong in ((2, 2), (2, 1, 1), (1, 3, 1), (3,)):
        bad = LoRA(good.A, good.B, R={first: torch.ones(wrong)})
        for refuse in (model.set_adapter, model.check_fit):
            said = re.escape(f"R of {first}: got {wrong}, with this A the model takes (3, 3), or (h, k, k)")
            with pytest.raises(StrategyError, match=said):
                refuse(bad)
