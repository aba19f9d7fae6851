"""Every kind of adapter, and every start, on every layout of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from fedlora import config
from fedlora.cli.options import dotted
from fedlora.data.rows import Rows
from fedlora.data.schema import Schema
from fedlora.errors import ConfigError, DataError, ModelError, StrategyError
from fedlora.lora import LoRA
from fedlora.models import adapter as adapters
from fedlora.models import base_model
from fedlora.models.adapted_modules import find_targets
from fedlora.models.model import Model
from fedlora.models.peft_files import load_peft, save_peft
from fedlora.sections import LoRAConfig, ModelConfig
from tests.support.models import FORMS, TEXT, WORDS, batch, computed, logits, make, plain_logits, random_adapter

Maker = Callable[..., Model]

MODELS = ("llama", "gpt2", "bert")
PUBLIC: Rows = [{"text": " ".join(WORDS[i : i + 9]), "label": "maybe"} for i in range(40)]
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 5.0},
    "rslora": {"alpha": 5.0, "rslora": True},
    "patterns": {"rslora": True, "rank_pattern": "{0}=4,0.{0}=2", "alpha_pattern": "1.{0}=7"},
    "dora": {"kind": "dora", "alpha": 5.0},
    "dora, patterns": {"kind": "dora", "rank_pattern": "0.{0}=2", "alpha_pattern": "{0}=7"},
    "vera": {"kind": "vera"},
    "vera, every shape": {"kind": "vera", "targets": ("all-linear",)},
    "gaussian": {"init": "gaussian"},
    "orthonormal": {"init": "orthonormal"},
    "pissa": {"init": "pissa", "alpha": 5.0},
    "olora": {"init": "olora", "alpha": 5.0},
    "eva": {"init": "eva", "init_data": "public.jsonl"},
}
LAST = {"llama": "v_proj", "gpt2": "c_attn", "bert": "value"}  # of the adapted modules' names
CASES = [(m, a) for m in MODELS for a in ADAPTERS if (m, a) != ("gpt2", "olora")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {model: make(model, tmp_path_factory.mktemp(model)) for model in MODELS}


@pytest.fixture
def build(folders: dict[str, Path]) -> Maker:
    def one(model: str, seed: int = 1, public: Rows = PUBLIC, dtype: Any = "float32", **lora: Any) -> Model:
        lora = {key: value.format(LAST[model]) if isinstance(value, str) else value for key, value in lora.items()}
        base = ModelConfig(path=str(folders[model]), dtype=dtype, max_length=32)
        return Model(base, LoRAConfig(**({"rank": 3} | lora)), FORMS[model], seed, public)

    return one


@pytest.fixture
def bare(folders: dict[str, Path]) -> Callable[[str], Any]:
    return lambda model: base_model.load_base_model(ModelConfig(path=str(folders[model])), FORMS[model], seed=1)[0]


def attach(net: Any, lora: LoRAConfig, schema: Schema, new: list[str]) -> Any:
    return adapters.attach_adapter(net, lora, schema, find_targets(net, lora, schema, new), 1)


@pytest.mark.parametrize(("model", "adapter"), CASES)
def test_what_is_delivered_gives_its_logits_on_a_clean_base_and_opens_as_it_was(
    build: Maker, bare: Callable[[str], Any], model: str, adapter: str, tmp_path: Path
) -> None:
    built = build(model, **ADAPTERS[adapter])
    trained = random_adapter(built, 4)
    built.set_adapter(trained.only("H"))
    before = logits(built, model)
    built.set_adapter(trained)
    assert_close(vars(built.get_adapter()), vars(trained), rtol=0, atol=0)
    wanted = logits(built, model)
    assert not torch.allclose(wanted, before, rtol=1e-4, atol=1e-4)
    save_peft(built, trained, tmp_path)
    loaded: Any = PeftModel.from_pretrained(bare(model), str(tmp_path))
    assert_close(plain_logits(loaded, model), wanted, rtol=1e-5, atol=1e-5)
    assert_close(vars(load_peft(build(model, **ADAPTERS[adapter]), tmp_path)), vars(trained), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("model", "adapter"), CASES)
def test_the_base_stays_bit_identical_and_the_start_is_the_pretrained_model(
    build: Maker, bare: Callable[[str], Any], model: str, adapter: str
) -> None:
    """PiSSA's and OLoRA's start only with its product taken off again, as an offset."""
    built, clean = build(model, **ADAPTERS[adapter]), bare(model)
    for name, layer in built.adapted.items():
        assert torch.equal(layer.get_base_layer().weight, clean.get_submodule(name).weight)
    start = built.get_adapter()
    if adapter in ("pissa", "olora"):
        assert not torch.allclose(logits(built, model), plain_logits(clean, model), rtol=1e-4, atol=1e-5)
        built.set_adapter(start, (LoRA(start.A, {m: -b for m, b in start.B.items()}),))
    assert_close(logits(built, model), plain_logits(clean, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "adapter"), [(m, a) for m, a in CASES if a in ("pissa", "olora")])
def test_the_start_is_what_peft_would_take_off(
    build: Maker, bare: Callable[[str], Any], model: str, adapter: str
) -> None:
    built, clean, net = build(model, **ADAPTERS[adapter]), bare(model), bare(model)
    options = LoraConfig(r=3, lora_alpha=5, target_modules=list(built.adapted), init_lora_weights=adapter)
    get_peft_model(net, options)
    start = built.get_adapter()
    for m in start.A:
        taken = computed(clean.get_submodule(m)) - computed(net.get_submodule(f"{m}.base_layer"))
        assert_close(5 / 3 * start.B[m] @ start.A[m], taken, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_start_depends_on_its_seed_alone(build: Maker, adapter: str) -> None:
    torch.manual_seed(123)
    one = build("bert", **ADAPTERS[adapter]).get_adapter()
    torch.manual_seed(456)
    again, other = (
        build("bert", **ADAPTERS[adapter]).get_adapter(),
        build("bert", seed=2, **ADAPTERS[adapter]).get_adapter(),
    )
    assert_close(vars(again), vars(one), rtol=0, atol=0)
    drawn = adapter not in ("pissa", "olora", "eva") and "vera" not in adapter
    assert drawn != all(torch.equal(a, other.A[m]) for m, a in one.A.items())


@pytest.mark.parametrize("adapter", ["orthonormal", "pissa", "olora", "eva"])
def test_the_sign_of_a_row_is_fixed(build: Maker, adapter: str) -> None:
    for a in build("bert", **ADAPTERS[adapter]).get_adapter().A.values():
        assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("adapter", ["orthonormal", "eva"])
def test_a_start_of_directions_has_orthonormal_rows(build: Maker, adapter: str) -> None:
    start = build("bert", **ADAPTERS[adapter]).get_adapter()
    for m, a in start.A.items():
        assert_close(a @ a.T, torch.eye(3), rtol=1e-5, atol=1e-6)
        assert not start.B[m].any()


def test_gaussian_rows_have_a_deviation_of_one_in_the_rank(build: Maker) -> None:
    drawn = torch.cat([a.flatten() for a in build("llama", rank=8, init="gaussian").get_adapter().A.values()])
    assert float(drawn.std()) == pytest.approx(1 / 8, rel=0.1)
    assert float(drawn.abs().max()) > 2 / 8  # no uniform one


def test_eva_spans_what_its_inputs_span_most(build: Maker, bare: Callable[[str], Any]) -> None:
    """Against the eigenvectors of the Gram matrix, of inputs collected apart."""
    built, net, seen = build("gpt2", **ADAPTERS["eva"]), bare("gpt2"), []
    net.get_submodule("transformer.h.1.attn.c_attn").register_forward_hook(lambda _m, x, _y: seen.append(x[0][0]))
    for example in built.encoder(PUBLIC):
        net.eval()(input_ids=example["input_ids"][None])
    x = torch.cat(seen).double()
    leading = torch.linalg.eigh(x.T @ x)[1][:, -3:]
    a = built.get_adapter().A["transformer.h.1.attn.c_attn"].double()
    assert_close(a.T @ a, leading @ leading.T, rtol=1e-4, atol=1e-5)


def test_eva_wants_inputs_of_as_many_directions_as_the_rank(build: Maker) -> None:
    with pytest.raises(DataError, match=r"init_data: its \d+ inputs of .* directions, and the rank is 12"):
        build("llama", public=PUBLIC[:1], init="eva", init_data="public.jsonl", rank=12)


@pytest.mark.parametrize("trains", ["A", "B", "H", "BH", "ABH"])
@pytest.mark.parametrize("adapter", ["lora", "dora", "vera", "pissa"])
def test_a_frozen_side_has_no_gradient(build: Maker, adapter: str, trains: str) -> None:
    built = build("bert", **ADAPTERS[adapter])
    built.set_adapter(random_adapter(built, 1))
    built.set_trainable("ABH")
    built.loss(batch("bert")).backward()  # a client that failed here leaves its gradients
    chosen = built.set_trainable(trains)
    built.loss(batch("bert")).backward()
    assert {id(p) for p in built.net.parameters() if p.grad is not None} == {id(p) for p in chosen}
    assert len(chosen) == sum(len(built.get_adapter().side(side)) for side in trains)


def test_magnitudes_travel_with_the_head_and_are_no_head(build: Maker) -> None:
    built, clean = build("bert", kind="dora"), build("bert")
    magnitudes = {f"{m}.lora_magnitude_vector": computed(layer).norm(dim=1) for m, layer in clean.adapted.items()}
    assert_close({k: h for k, h in built.get_adapter().H.items() if k in built.extras}, magnitudes)
    assert set(built.extras) == set(magnitudes) and set(built.heads) == set(clean.get_adapter().H)
    assert {id(p) for p in built.set_trainable("H")} == {id(p) for p in (*built.heads.values(), *built.extras.values())}


@pytest.mark.parametrize("model", MODELS)
def test_vera_computes_its_formula(build: Maker, model: str) -> None:
    """W + diag(b) B diag(d) A, of the shared A and B what fits the module."""
    built = build(model, kind="vera", rank=40, targets=("all-linear",))
    before, given = {m: computed(layer) for m, layer in built.adapted.items()}, random_adapter(built, 1)
    built.set_adapter(given)
    vera_a, vera_b = (getattr(built.net.base_model, key)["default"] for key in ("vera_A", "vera_B"))
    for m, layer in built.adapted.items():
        a, b = vera_a[:, : layer.in_features], vera_b[: layer.out_features]
        wanted = before[m] + given.B[m][:, None] * b @ (given.A[m][:, None] * a)
        assert_close(computed(layer), wanted, rtol=1e-4, atol=1e-5)


def test_veras_vectors_open_over_their_own_matrices_only(build: Maker, tmp_path: Path) -> None:
    built = build("llama", kind="vera")
    save_peft(built, built.get_adapter(), tmp_path)
    with pytest.raises(ModelError, match="its vera_A is of another seed"):
        load_peft(build("llama", seed=2, kind="vera"), tmp_path)


def test_an_adapter_of_another_kind_is_not_opened(build: Maker, tmp_path: Path) -> None:
    built = build("llama", kind="dora")
    save_peft(built, built.get_adapter(), tmp_path)
    with pytest.raises(ModelError, match=r"holds a dora adapter; open it with lora.kind = dora"):
        load_peft(build("llama"), tmp_path)


def test_a_pattern_gives_modules_ranks_and_alphas_of_their_own(build: Maker) -> None:
    """Of two names that fit, the one of more parts counts; parts of the full name may be left out."""
    built = build("llama", alpha=6.0, rank_pattern="layers.0.q_proj=6,q_proj=2", alpha_pattern="v_proj=12")
    q, v = (f"model.layers.{{}}.self_attn.{name}" for name in ("q_proj", "v_proj"))
    ranks = {m: a.shape[0] for m, a in built.get_adapter().A.items()}
    assert ranks == {q.format(0): 6, q.format(1): 2, v.format(0): 3, v.format(1): 3}
    assert built.scales == {q.format(0): 1.0, q.format(1): 3.0, v.format(0): 4.0, v.format(1): 4.0}


def test_a_pattern_means_the_same_in_every_place(tmp_path: Path) -> None:
    pattern = "v_proj=4,layers.0.q_proj=16"
    (tmp_path / "run.toml").write_text(f'[lora]\nrank_pattern = "{pattern}"\nalpha_pattern = "v_proj=0.5"')
    file = config.build(config.read(tmp_path / "run.toml"))
    words = ["--lora.rank_pattern", pattern, "--lora.alpha_pattern=v_proj=0.5"]
    assert file == config.build(dotted(words)) == config.build(config.flatten(file))
    assert file.lora.pattern("rank_pattern") == {"v_proj": 4, "layers.0.q_proj": 16}


@pytest.mark.parametrize(
    ("model", "lora", "error", "says"),
    [
        ("llama", {"rank_pattern": "v_prog=4"}, ModelError, 'no adapted module has the name "v_prog"; .*"v_proj"'),
        ("llama", {"alpha_pattern": "layers.2.v_proj=4"}, ModelError, 'did you mean "model.layers.1.self_attn.v_proj"'),
        ("llama", {"rank_pattern": "self_attn=4"}, ModelError, 'no adapted module has the name "self_attn"'),
        ("llama", {"rank_pattern": "v_proj=13"}, ModelError, "rank_pattern = 13 .*v_proj .12 x 24.*at most 12"),
        ("llama", {"rank_pattern": "v_proj"}, ConfigError, '"v_proj" is no NAME=NUMBER'),
        ("llama", {"rank_pattern": "v_proj=2.5"}, ConfigError, "v_proj=2.5 is no whole number"),
        ("llama", {"alpha_pattern": "v_proj=-1"}, ConfigError, '"v_proj=-1" is no NAME=NUMBER'),
        ("llama", {"init": "eva"}, ConfigError, "set lora.init_data"),
        ("llama", {"kind": "dora", "init": "pissa"}, ConfigError, "init = pissa needs an offset"),
        ("llama", {"kind": "vera", "rslora": True}, ConfigError, "vera has A and B of its own"),
        ("gpt2", {"init": "olora"}, ModelError, "PEFT cannot take it from .*c_attn, a Conv1D; choose pissa"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    build: Maker, model: str, lora: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        build(model, **lora)


def test_pissa_wants_weights_that_are_not_quantised(bare: Callable[[str], Any]) -> None:
    net = bare("llama")
    module = net.get_submodule("model.layers.1.self_attn.v_proj")
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"the weight of model.layers.1.self_attn.v_proj is quantised"):
        attach(net, LoRAConfig(rank=3, init="pissa"), TEXT, [])


def test_what_is_new_is_trained_whole_and_not_adapted(bare: Callable[[str], Any]) -> None:
    net = bare("bert")
    lora = LoRAConfig(rank=3, targets=("dense",))
    built = attach(net, lora, FORMS["bert"], ["bert.pooler.dense"])
    assert len(adapters.layers(built)) == 2 * 3 and all("layer" in name for name in adapters.layers(built))
    assert built.get_submodule("base_model.model.bert.pooler.dense.modules_to_save")


def test_dora_refuses_an_offset_and_vera_whatever_is_not_two_vectors(build: Maker) -> None:
    dora, vera = build("llama", kind="dora"), build("llama", kind="vera")
    part, first = random_adapter(build("llama"), 1), next(iter(vera.adapted))
    with pytest.raises(StrategyError, match=r"lora.kind = dora takes no offset: its magnitudes"):
        dora.set_adapter(dora.get_adapter(), (part,))
    cores = LoRA(R={first: torch.eye(3)})
    with pytest.raises(StrategyError, match=r"lora.kind = dora takes no offset: .*; nor a core"):
        dora.set_adapter(cores.over(dora.get_adapter()))
    for built, offset, gain in (LoRA(), (part,), {}), (cores, (), {}), (LoRA(), (), {first: 2.0}):
        with pytest.raises(StrategyError, match=r"lora.kind = vera takes no offset, core or gain"):
            vera.set_adapter(built, offset, gain)
    with pytest.raises(StrategyError, match=rf"A of {first}: got \(2,\), the model takes \(3,\)$"):
        vera.set_adapter(LoRA(A={m: a[:2] for m, a in vera.get_adapter().A.items()}))


@pytest.mark.parametrize(("adapter", "more"), [("lora", 16 * 2 * (24 + 24 + 24 + 12)), ("vera", 16 * 4)])
def test_the_memory_to_train_in_grows_with_the_rank_by_four_copies(build: Maker, adapter: str, more: int) -> None:
    """Of a number a row and a column in each module of two layers; of VeRA, one a module."""
    built = build("llama", **ADAPTERS[adapter])
    assert built.memory(4) - built.memory(3) == more
    assert built.memory(4, batch_size=17) > built.memory(4)


def test_a_base_in_half_precision_takes_half_the_memory(build: Maker) -> None:
    whole, half = build("bert"), build("bert", dtype="bfloat16")
    trained = 4 * sum(
        t.numel() for t in (*whole.get_adapter().A.values(), *whole.get_adapter().B.values(), *whole.heads.values())
    )
    saved = whole.memory(3) - half.memory(3)
    assert saved == pytest.approx((whole.memory(3) - 4 * trained) / 2, rel=0.05)


def test_it_is_the_form_that_says_what_public_rows_are(build: Maker) -> None:
    built = build("gpt2", public=[{TEXT.columns[0]: row["text"]} for row in PUBLIC], **ADAPTERS["eva"])
    assert_close(vars(built.get_adapter()), vars(build("gpt2", **ADAPTERS["eva"]).get_adapter()), rtol=0, atol=0)
