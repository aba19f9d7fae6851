"""Which modules are adapted: of models with experts, state spaces, routers, image towers, or nothing linear."""

from typing import Any

import pytest
import torch
import transformers as t

from fedlora.data.schema import Schema
from fedlora.errors import ModelError
from fedlora.models import adapted_modules as found_modules
from fedlora.models.adapted_modules import AdaptedModules, coverage, find_targets
from fedlora.models.adapter import attach_adapter, layers
from fedlora.models.probe import called_modules
from fedlora.sections import LoRAConfig
from tests.support.models import IMAGE, TEXT, tokenizer

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS = EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
NETS: dict[str, Any] = {
    "glm": lambda: t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**WIDE, **GROUPS)),
    "deepseek": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**SMALL, intermediate_size=48, num_key_value_heads=4, **LATENT, **GROUPS)
    ),
    "qwen": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**WIDE, num_experts=4, **EXPERTS)),
    "llama4": lambda: t.Llama4ForCausalLM(
        t.Llama4TextConfig(**WIDE, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1)
    ),
    "qwen-next": lambda: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(
            **WIDE,
            **LINEAR,
            **EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=24,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "granite": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**{k: v for k, v in WIDE.items() if k != "head_dim"}, num_local_experts=4)
    ),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**MAMBA)),
    "falcon-h1": lambda: t.FalconH1ForCausalLM(t.FalconH1Config(**WIDE, **FALCON)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL)),
    "resnet": lambda: t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    ),
}


def chosen(net: Any, schema: Schema = TEXT, rank: int = 4, *wanted: str) -> AdaptedModules:
    """The targets, after PEFT has attached an adapter to just them."""
    lora = LoRAConfig(rank=rank, targets=wanted)
    called = called_modules(net, tokenizer(), schema, "float32") if schema is TEXT else None
    found = find_targets(net, lora, schema, [], called)
    coverage(net, found)
    assert layers(attach_adapter(net, lora, schema, found, seed=0)).keys() == found.modules.keys()
    return found


@pytest.fixture
def net(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return NETS[request.param]()


def ends(found: AdaptedModules) -> set[str]:
    return set(map(found_modules.last_part, found.modules))


@pytest.mark.parametrize("net", ["glm", "deepseek", "qwen", "llama4", "qwen-next", "granite"], indirect=True)
def test_all_linear_leaves_out_fused_experts_and_says_so(net: Any) -> None:
    found = chosen(net, TEXT, 4, "all-linear")
    assert found_modules.EXPERTS in found.left_out.values()
    assert not any(".experts" in name for name in found.modules)


@pytest.mark.parametrize("net", ["glm", "deepseek"], indirect=True)
def test_the_default_is_what_peft_can_load(net: Any) -> None:
    assert not ends(chosen(net)) & {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("net", ["glm", "qwen", "deepseek"], indirect=True)
def test_the_names_of_fused_experts_are_refused_with_the_reason(net: Any) -> None:
    with pytest.raises(ModelError, match=r'lora.targets: .*experts.*leave ("gate_proj" out|it out)') as refused:
        chosen(net, TEXT, 4, "gate_proj", "up_proj", "down_proj")
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(("net", "gate"), [("llama4", "router"), ("qwen-next", "shared_expert_gate")], indirect=["net"])
def test_a_router_narrower_than_the_rank_is_left_out_of_all_linear(net: Any, gate: str) -> None:
    found = chosen(net, TEXT, 4, "all-linear")
    left = {name: reason for name, reason in found.left_out.items() if name.endswith(gate)}
    assert left
    assert all("less than the rank" in reason for reason in left.values())


@pytest.mark.parametrize("net", ["llama4"], indirect=True)
def test_a_router_that_gives_more_than_a_product_is_left_out_at_any_rank(net: Any) -> None:
    found = chosen(net, TEXT, 1, "all-linear")
    assert "router" not in ends(found)
    assert "it is a router" in next(reason for name, reason in found.left_out.items() if name.endswith("router"))


@pytest.mark.parametrize("net", ["falcon"], indirect=True)
def test_a_linear_layer_of_an_architectures_own_kind_is_adapted(net: Any) -> None:
    assert "query_key_value" in ends(chosen(net, TEXT, 2, "all-linear"))


@pytest.mark.parametrize("net", ["qwen"], indirect=True)
def test_a_rank_above_what_most_modules_take_is_refused_all_the_same(net: Any) -> None:
    with pytest.raises(ModelError, match="choose a rank of at most 16"):
        chosen(net, TEXT, 40, "all-linear")


@pytest.mark.parametrize("net", ["mamba", "falcon-h1"], indirect=True)
@pytest.mark.parametrize("wanted", [(), ("all-linear",)], ids=["default", "all-linear"])
def test_what_a_state_space_kernel_takes_uncalled_is_left_out(net: Any, wanted: tuple[str, ...]) -> None:
    found = chosen(net, TEXT, 2, *wanted)
    assert not ends(found) & {"x_proj", "dt_proj", "out_proj"}
    assert ends(found) & {"in_proj", "q_proj"}


@pytest.mark.parametrize("net", ["mamba", "falcon-h1"], indirect=True)
def test_out_proj_of_a_state_space_is_refused_with_the_reason(net: Any) -> None:
    with pytest.raises(ModelError, match=r"out_proj of .* cannot be adapted: the model takes its weight without"):
        chosen(net, TEXT, 2, "in_proj", "out_proj")


def test_the_output_of_pytorchs_own_attention_is_left_out() -> None:
    """SigLIP has one in its pooling; its backbone is not called as in the other models of its kind."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vision = small | {"image_size": 16, "patch_size": 8}
    config = t.SiglipConfig(vision_config=vision, text_config=small | {"vocab_size": 64}, num_labels=3)
    found = chosen(t.SiglipForImageClassification(config), IMAGE, 4, "all-linear")
    assert found.heads == ("classifier",)
    assert found.left_out == {"vision_model.head.attention.out_proj": found_modules.KERNEL}


@pytest.mark.parametrize("net", ["resnet"], indirect=True)
def test_a_model_without_linear_layers_is_refused_in_a_sentence(net: Any) -> None:
    with pytest.raises(ModelError, match="ResNetForImageClassification has no linear layer outside its head"):
        chosen(net, IMAGE)


def test_a_tower_for_images_is_left_out_where_the_data_are_text() -> None:
    """Its q_proj and v_proj have the names of the language model's, and no text ever passes through them."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = t.Gemma3Config(
        text_config=WIDE | {"sliding_window": 16},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_id=60,
        boi_token_id=61,
        eoi_token_id=62,
    )
    found = chosen(t.Gemma3ForConditionalGeneration(config))
    assert found.modules
    assert all("vision" not in name for name in found.modules)
    assert {reason for name, reason in found.left_out.items() if "vision" in name} == {found_modules.UNCALLED}


@pytest.mark.parametrize("net", ["qwen-next"], indirect=True)
def test_coverage_counts_the_layers_that_are_reached(net: Any) -> None:
    lora = LoRAConfig(rank=4)
    found = coverage(net, find_targets(net, lora, TEXT, []))
    assert (dict(found.adapted), found.layers, found.of_layers) == ({"q_proj": 1, "v_proj": 1}, 1, 2)
    assert "1 of 2 layers have an adapter, on q_proj, v_proj" in found_modules.reach_notes(found, lora)[0]
    assert not found_modules.reach_notes(found, LoRAConfig(rank=4, targets=("q_proj", "v_proj")))


def test_coverage_counts_what_is_left_out_by_name_with_every_reason() -> None:
    left_out = {"a.0.out": "it is narrow", "a.1.out": "it is narrow", "b.out": "nothing calls it", "c.fc": "it is new"}
    found = coverage(torch.nn.Linear(1, 1), AdaptedModules({}, (), left_out, ()))
    assert found.left_out == {"out": ("it is narrow, or nothing calls it", 3), "fc": ("it is new", 1)}


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("embed_tokens", "is of the type Embedding, or in the head"), ("q_prog", 'did you mean "q_proj"')],
)
@pytest.mark.parametrize("net", ["qwen"], indirect=True)
def test_a_target_that_is_no_linear_module_is_refused(net: Any, wanted: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        chosen(net, TEXT, 4, wanted)
