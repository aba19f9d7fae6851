"""Tiny random models of the architectures that transformers has, saved as anybody's checkpoint would be.

A row of `ARCHITECTURES` is what `AutoConfig.for_model` is given. Language models are saved as such, and serve as
classifiers too, with a head that the checkpoint lacks; encoders are saved without any head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Task = Literal["lm", "classify", "image"]

WORDS = tuple(f"w{i}" for i in range(60))
SPECIAL = ("[PAD]", "[UNK]", "<s>", "</s>")
SIDE = 32  # of an image, in pixels
AUTO: Mapping[Task, str] = {  # transformers' classes by the names of model.task
    "lm": "AutoModelForCausalLM",
    "classify": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture as transformers names it, the numbers that make it tiny, and what it is to learn."""

    name: str
    options: Mapping[str, Any]
    tasks: tuple[Task, ...]
    saved_as: str  # transformers' class of the checkpoint


ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
WIDE: dict[str, Any] = ENDS | {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"intermediate_size": 48, "max_position_embeddings": 64}
WIDE |= dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.2)  # scores far enough from chance
DECODER = WIDE | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = DECODER | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 4}
DENSE_FIRST = SHARED | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = DENSE_FIRST | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4}
LATENT.pop("head_dim")  # theirs are those above
GATED_DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
GATED_DELTA |= {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATE = WIDE | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2}
HYBRID = EXPERTS | {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
HYBRID |= {"mamba_chunk_size": 8, "mamba_d_ssm": 64, "mamba_expand": 2}
HYBRID |= {"attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1}
ENCODER_DECODER = WIDE | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ENCODER_DECODER |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
ENCODER_DECODER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
ENCODER_DECODER |= {"decoder_start_token_id": 2}
ROBERTA = WIDE | {"pad_token_id": 1, "type_vocab_size": 1}  # its positions begin after the pad token's
PICTURE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PICTURE |= {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.2}
SWIN = {"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "embedding_size": 16, "image_size": SIDE}
TEXT_TOWER = DECODER | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
IMAGE_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE_TOWER |= {"image_size": SIDE, "patch_size": 8}
MULTIMODAL = {"text_config": TEXT_TOWER, "vision_config": IMAGE_TOWER, "mm_tokens_per_image": 4} | ENDS
HASHED = WIDE | {"attn_layers": ["lsh", "lsh"], "lsh_attn_chunk_length": 2, "num_buckets": 4, "axial_pos_embds": False}
HASHED |= {"attention_head_size": 8, "feed_forward_size": 48}
XLNET = ENDS | {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}


def _rows(tasks: tuple[Task, ...], options: Mapping[str, Any], names: str, saved_as: str = "") -> list[Architecture]:
    """An architecture for each name; without `saved_as`, the checkpoints are of language models or have no head."""
    saved_as = saved_as or (AUTO["lm"] if "lm" in tasks else "AutoModel")
    return [Architecture(name, options, tasks, saved_as) for name in names.split()]


LM: tuple[Task, ...] = ("lm",)
CLASSIFY: tuple[Task, ...] = ("classify",)
BOTH: tuple[Task, ...] = ("lm", "classify")
IMAGE: tuple[Task, ...] = ("image",)

ARCHITECTURES = (
    *_rows(BOTH, DECODER, "llama mistral qwen3 gemma gemma2 gemma3_text phi phi3 smollm3 olmo olmo2 olmo3"),
    *_rows(BOTH, DECODER, "stablelm starcoder2 glm glm4 exaone4 nemotron seed_oss ministral modernbert-decoder"),
    *_rows(LM, DECODER, "cohere cohere2 granite apertus"),
    *_rows(BOTH, WIDE, "gpt2 gpt_neox gpt_bigcode bloom falcon mpt biogpt opt openai-gpt"),
    *_rows(BOTH, WIDE | {"rotary_dim": 4}, "gptj"),
    *_rows(LM, WIDE | {"rotary_dim": 4}, "codegen rwkv"),
    *_rows(BOTH, SHARED, "mixtral qwen2_moe qwen3_moe gpt_oss phimoe jetmoe minimax"),
    *_rows(LM, SHARED, "olmoe granitemoe"),
    *_rows(LM, DENSE_FIRST, "glm4_moe ernie4_5_moe"),
    *_rows(BOTH, LATENT, "deepseek_v2 deepseek_v3"),
    *_rows(LM, LATENT, "glm4_moe_lite"),
    *_rows(BOTH, SHARED | GATED_DELTA, "qwen3_next qwen3_5_text"),
    *_rows(LM, STATE, "mamba mamba2 falcon_mamba"),
    *_rows(LM, HYBRID, "falcon_h1 bamba lfm2 recurrent_gemma"),
    *_rows(BOTH, HYBRID, "jamba"),
    *_rows(BOTH, MULTIMODAL, "gemma3"),
    *_rows(LM, ENDS | {"text_config": DECODER, "vision_config": IMAGE_TOWER}, "llama4"),
    *_rows(LM, MULTIMODAL, "mistral3 qwen2_vl qwen2_5_vl qwen3_vl llava", saved_as="AutoModelForImageTextToText"),
    *_rows(CLASSIFY, WIDE, "bert deberta deberta-v2 modernbert distilbert electra albert mpnet roformer"),
    *_rows(
        CLASSIFY,
        WIDE,
        "convbert fnet big_bird nystromformer rembert nomic_bert eurobert xlm flaubert esm ibert ernie longformer "
        "layoutlm yoso",
    ),
    *_rows(CLASSIFY, WIDE | {"embedding_size": 32}, "squeezebert mobilebert"),
    *_rows(CLASSIFY, ROBERTA, "roberta xlm-roberta camembert"),
    *_rows(BOTH, XLNET, "xlnet"),
    *_rows(CLASSIFY, HASHED, "reformer"),
    *_rows(CLASSIFY, ENCODER_DECODER, "t5 mt5 umt5"),
    *_rows(BOTH, ENCODER_DECODER, "bart mbart"),
    *_rows(IMAGE, PICTURE, "vit deit beit dinov2 dinov2_with_registers vit_msn data2vec-vision ijepa"),
    *_rows(IMAGE, {"text_config": WIDE, "vision_config": IMAGE_TOWER}, "clip siglip siglip2"),
    *_rows(IMAGE, SWIN, "swin swinv2"),
    *_rows(IMAGE, STAGES, "convnext convnextv2 resnet regnet mobilevit mobilenet_v2 segformer poolformer"),
)


def save(architecture: Architecture, task: Task, folder: Path) -> Path:
    """Save a model with random weights, and its tokenizer or image processor, as a folder for `model.path`."""
    import transformers

    config = transformers.AutoConfig.for_model(architecture.name, **architecture.options)
    torch.manual_seed(0)
    getattr(transformers, architecture.saved_as).from_config(config).save_pretrained(folder)
    (image_processor() if task == "image" else tokenizer(config)).save_pretrained(folder)
    return folder


def tokenizer(config: Any) -> Any:
    """A tokenizer with a token a word, whose pad, begin and end tokens have the model's ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = config.get_text_config()
    ids = {"[PAD]": text.pad_token_id, "<s>": text.bos_token_id, "</s>": text.eos_token_id}
    ids["[UNK]"] = next(i for i in range(4) if i not in ids.values())
    wrapper: Any = PreTrainedTokenizerFast  # untyped
    inner = Tokenizer(models.WordLevel(ids | {w: i for i, w in enumerate(WORDS, start=4)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return wrapper(tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **names)


def image_processor() -> Any:
    from transformers import ViTImageProcessor

    processor: Any = ViTImageProcessor  # untyped
    return processor(size={"height": SIDE, "width": SIDE})
