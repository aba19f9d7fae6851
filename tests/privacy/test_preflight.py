"""What a model must show before a client's first private step, and the models that are turned away, by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Example
from fedlora.errors import PrivacyError
from fedlora.jobs import PrivacyTerms
from fedlora.lora import LoRA
from fedlora.models.cores import BlockDiagonal
from fedlora.models.model import Model
from fedlora.privacy import dpsgd, per_sample_gradients, preflight
from fedlora.privacy.dpsgd import STANDARD
from fedlora.privacy.per_sample_gradients import LAYERS, OnePassGradients, OpacusGradients
from fedlora.sections import LoRAConfig, ModelConfig
from fedlora.strategy import Job
from tests.support.models import FORMS, LABEL, TEXT, make, tokenizer
from tests.support.zoo import MIXTRAL, OPT, QWEN_MOE, WIDE

TERMS = PrivacyTerms(noise=1.0, clip=1.0, head_share=0.5, rate=0.5, steps=1, delta=1e-5)
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:.*sensitivity")


def private(model: Model, engine: str = "auto", **job: Any) -> Job:
    return Job(**({"start": model.get_adapter()} | job), privacy=replace(TERMS, engine=engine))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in FORMS}


@pytest.fixture(scope="module")
def build(folders: dict[str, Path]) -> Callable[..., Model]:
    def one(named: str, dtype: Any = "float32", **lora: Any) -> Model:
        base = ModelConfig(path=str(folders[named]), dtype=dtype, max_length=24)
        return Model(base, LoRAConfig(**({"rank": 3} | lora)), FORMS[named], seed=1)

    return one


def adapted(net: Any, folder: Path, form: Schema, *targets: str) -> Model:
    """A model of another kind, as anybody would bring it."""
    net.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return Model(ModelConfig(path=str(folder), max_length=24), LoRAConfig(rank=3, targets=targets), form, seed=1)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("engine", ["auto", "hooks", "one"])
def test_models_that_keep_records_apart_pass(build: Callable[..., Model], kind: str, engine: str) -> None:
    model = build(kind, targets=("all-linear",), dropout=0.1)
    found = preflight.check(model, private(model, engine))
    assert found.error < 1e-5 and 0.999 < found.sensitivity < 1.001


@pytest.mark.parametrize("engine", ["lora", "hooks"])
def test_over_a_base_in_bf16_records_are_taken_one_at_a_time(build: Callable[..., Model], engine: str) -> None:
    """In one micro-batch a long record moves the rounding of all others, and so the sum by more than the clip."""
    model = build("llama", dtype="bfloat16")
    found = preflight.check(model, private(model))
    assert found.error < 1e-5 and 0.999 < found.sensitivity < 1.001
    with pytest.raises(PrivacyError, match=f"dp.engine = {engine} over a base of fewer than 32 bits"):
        preflight.check(model, private(model, engine))


def test_a_model_is_looked_at_once_for_every_way_to_train_it(build: Callable[..., Model]) -> None:
    model, passes = build("llama"), []
    model.net.register_forward_pre_hook(lambda *_: passes.append(1))
    preflight.check_once(model, private(model))
    first = len(passes)
    preflight.check_once(model, private(model))
    assert len(passes) == first > 0
    for other in (private(model, trains="B"), private(model, "one")):
        before = len(passes)
        preflight.check_once(model, other)
        assert len(passes) > before


def refused(model: Model, match: str, engine: str = "auto", **job: Any) -> None:
    with pytest.raises(PrivacyError, match=match):
        preflight.check(model, private(model, engine, **job))


@pytest.mark.parametrize("engine", ["auto", "hooks", "lora", "one"])
def test_a_batch_norm_is_refused_whatever_the_engine(build: Callable[..., Model], engine: str) -> None:
    """Frozen as it is, it mixes the images of a batch, and keeps their mean."""
    model = build("vit")
    patches = model.net.base_model.model.vit.embeddings.patch_embeddings
    patches.projection = nn.Sequential(patches.projection, nn.BatchNorm2d(24))
    refused(model, r"vit.embeddings.patch_embeddings.projection.1 is a BatchNorm2d: in training it mixes", engine)


@pytest.mark.parametrize(
    ("kind", "named"),
    [("dora", r"layers.0.self_attn.q_proj.lora_magnitude_vector.default is a DoraLinearLayer"),
     ("vera", r"layers.0.self_attn.q_proj.vera_lambda_b is a ParameterDict")],
)  # fmt: skip
def test_dora_and_vera_are_refused_but_for_one_at_a_time(build: Callable[..., Model], kind: str, named: str) -> None:
    model = build("llama", kind=kind)
    for engine in ("auto", "hooks", "lora"):
        refused(model, named, engine)
    assert preflight.check(model, private(model, "one")).sensitivity < 1.001


def without(key: str, folder: Path) -> Model:
    """BERT from a checkpoint that lacks an embedding, which is then learned with the head."""
    net = BertForSequenceClassification(BertConfig(**WIDE, num_labels=3))
    weights = {k: t for k, t in net.state_dict().items() if key not in k}
    net.save_pretrained(folder, state_dict=weights)
    tokenizer().save_pretrained(folder)
    return Model(ModelConfig(path=str(folder), max_length=24), LoRAConfig(rank=3), LABEL, seed=1)


def test_an_embedding_that_all_examples_share_is_refused(tmp_path: Path) -> None:
    """Positions are looked up once for the whole batch."""
    model = without("position_embeddings", tmp_path)
    named = r"bert.embeddings.position_embeddings.*"
    refused(model, "Opacus's hooks find no gradient of single examples for .*" + named)
    refused(model, named + "is a Embedding, of which one pass cannot", "lora")


def test_an_embedding_of_each_example_is_left_to_opacus(tmp_path: Path) -> None:
    model = without("word_embeddings", tmp_path)
    assert dpsgd.engine(model, model.set_trainable("ABH"), TERMS) is OpacusGradients
    assert dpsgd.engine(model, model.set_trainable("AB"), TERMS) is OnePassGradients
    assert preflight.check(model, private(model)).error < 1e-5


def test_tokens_in_one_heap_are_refused(tmp_path: Path) -> None:
    """OPT's linear layers see (batch x tokens, d): clipped by token, a record would count as often as it has tokens."""
    model = adapted(OPTForCausalLM(OPTConfig(**OPT)), tmp_path, TEXT, "fc1", "fc2")
    refused(model, r"layers.0.fc1.lora_A.default sees \d+ rows where there are 4 examples: its tokens lie in one heap")
    refused(model, r"hooks find no gradient of single examples for .*layers.0.fc1.lora_A", "hooks")
    assert preflight.check(model, private(model, "one")).sensitivity < 1.001


def test_experts_that_share_the_tokens_of_a_batch_are_refused(tmp_path: Path) -> None:
    """And a mixture of experts passes where its attention alone is trained."""
    model = adapted(Qwen2MoeForCausalLM(Qwen2MoeConfig(**QWEN_MOE)), tmp_path / "qwen", TEXT, "q_proj", "gate_proj")
    refused(model, r"layers.0.mlp.shared_expert.gate_proj.lora_A.default sees \d+ rows where there are 4 examples")
    model = adapted(MixtralForCausalLM(MixtralConfig(**MIXTRAL)), tmp_path / "mixtral", TEXT, "all-linear")
    assert preflight.check(model, private(model)).error < 1e-5


class Centred(nn.Module):
    """Takes off the mean of the batch, as contrastive models do."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Counting(nn.Module):
    """Remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean()
        return x


@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_a_model_that_mixes_records_is_refused(build: Callable[..., Model], engine: str) -> None:
    model = build("bert")
    layers = model.net.base_model.model.bert.encoder.layer
    layers[1].attention.output.LayerNorm = nn.Sequential(layers[1].attention.output.LayerNorm, Centred())
    refused(model, r"encoder.layer.\d.\S+: gradients of single records are \d+% off .* records mix", engine)


def test_a_core_is_refused_where_opacus_would_take_it_for_the_layers_output(build: Callable[..., Model]) -> None:
    model = build("llama")
    start = LoRA(model.get_adapter().A, model.get_adapter().B, R={m: torch.eye(3) for m in model.adapted})
    refused(model, r"lora_A.default: gradients of single records are \d+% off", "hooks", start=start, trains="ABR")
    assert preflight.check(model, private(model, "hooks", start=start, trains="R")).error < 1e-5
    assert preflight.check(model, private(model, start=start, trains="ABR")).error < 1e-5


def test_a_buffer_that_changes_is_refused(build: Callable[..., Model]) -> None:
    model = build("llama")
    model.net.base_model.model.model.norm = nn.Sequential(model.net.base_model.model.model.norm, Counting())
    refused(model, r"model.norm.1.seen changes while the model trains, with no noise on it")


def test_a_clip_that_does_not_hold_is_found(build: Callable[..., Model]) -> None:
    """Without one, and with one for every tensor, as if each were alone."""

    def apart(g: list[Tensor], groups: Any, bounds: Any) -> list[Tensor]:
        return [per_sample_gradients.clip([t], [0], bounds[:1])[0] for t in g]

    model = build("llama")
    for bad in (lambda g, *_: [torch.ones(len(t)) for t in g], apart):
        with pytest.raises(
            PrivacyError, match=r"one record moves the sum of clipped gradients by [\d.e+]+ times the clip"
        ):
            preflight.check(model, private(model), replace(STANDARD, clip=bad))


@pytest.mark.parametrize("kind", FORMS)
def test_made_up_examples_are_of_different_lengths_and_never_twice_the_same(
    build: Callable[..., Model], kind: str
) -> None:
    some: list[Example] = preflight.synthetic(build(kind).encoder, 4)
    assert len(some) == 4
    key = "pixel_values" if kind == "vit" else "input_ids"
    assert len({e[key].numpy().tobytes() for e in some}) == 4
    assert kind == "vit" or len({len(e[key]) for e in some}) == 4


def test_one_pass_knows_what_adapters_and_heads_are_made_of() -> None:
    assert {nn.Linear, nn.LayerNorm, BlockDiagonal} == set(LAYERS)
