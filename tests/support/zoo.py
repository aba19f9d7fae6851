"""Every kind of transformer that a private run may meet: tiny, random, with PEFT's LoRA whose B is not zero.

Built by transformers and PEFT alone, so that the engines are seen on what fedlora's own `Model` would not take, too.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import Encoder, Example
from fedlora.privacy.per_sample_gradients import Gradients

N, WORDS, CLASSES = 5, 67, 3  # examples in a batch, vocabulary, labels
WIDE = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0}
DECODER = WIDE | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
OPT |= {"max_position_embeddings": 32, "word_embed_proj_dim": 32}
MIXTRAL = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN_MOE |= {"shared_expert_intermediate_size": 24}
PICTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PICTURE |= {"image_size": 16, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
DISTIL = {"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}
MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}

CLS, LM, IMG, S2S = "SEQ_CLS", "CAUSAL_LM", None, "SEQ_2_SEQ_LM"  # PEFT's names of the tasks
QV = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Row:
    """How a model is made, what of it is trained, and the module at which the engines must refuse."""

    cls: str  # transformers' name
    options: dict[str, Any]
    task: str | None
    targets: tuple[str, ...] | str
    head: tuple[str, ...] = ()
    refused: str = ""


ROWS = {
    "bert-cls": Row("BertForSequenceClassification", WIDE, CLS, ("query", "value"), ("classifier",)),
    "distilbert-cls": Row(
        "DistilBertForSequenceClassification", DISTIL, CLS, ("q_lin", "v_lin"), ("pre_classifier", "classifier")
    ),
    "roberta-cls": Row(
        "RobertaForSequenceClassification", WIDE | {"pad_token_id": 1}, CLS, ("query", "value"), ("classifier",)
    ),
    "albert-cls (shared layers)": Row(
        "AlbertForSequenceClassification", WIDE | {"embedding_size": 16}, CLS, ("query", "value"), ("classifier",)
    ),
    "deberta-v2-cls": Row(
        "DebertaV2ForSequenceClassification", WIDE | DEBERTA, CLS, ("query_proj", "value_proj"), ("classifier",)
    ),
    "modernbert-cls": Row("ModernBertForSequenceClassification", WIDE | MODERN, CLS, ("Wqkv",), ("head", "classifier")),
    "llama-lm": Row("LlamaForCausalLM", DECODER, LM, QV),
    "llama-lm (tied, all-linear)": Row("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}, LM, "all-linear"),
    "llama-cls": Row("LlamaForSequenceClassification", DECODER, CLS, QV, ("score",)),
    "qwen2-lm": Row("Qwen2ForCausalLM", DECODER, LM, QV),
    "qwen3-lm": Row("Qwen3ForCausalLM", DECODER | {"head_dim": 8}, LM, QV),
    "gemma2-lm": Row("Gemma2ForCausalLM", DECODER | {"head_dim": 8}, LM, QV),
    "phi3-lm": Row("Phi3ForCausalLM", DECODER | {"bos_token_id": 1, "eos_token_id": 2}, LM, ("qkv_proj",)),
    "gpt2-lm (Conv1D)": Row("GPT2LMHeadModel", GPT2, LM, ("c_attn",)),
    "gpt2-cls (Conv1D)": Row("GPT2ForSequenceClassification", GPT2, CLS, ("c_attn",), ("score",)),
    "opt-lm": Row("OPTForCausalLM", OPT, LM, QV),
    "opt-lm (fc1, fc2)": Row("OPTForCausalLM", OPT, LM, ("fc1", "fc2"), refused=r"layers\.\d\.fc[12]"),
    "mixtral-lm (attention)": Row("MixtralForCausalLM", MIXTRAL, LM, QV),
    "mixtral-lm (all-linear)": Row("MixtralForCausalLM", MIXTRAL, LM, "all-linear", refused=r"mlp\.(gate|experts)"),
    "qwen2-moe-lm (all-linear)": Row("Qwen2MoeForCausalLM", QWEN_MOE, LM, "all-linear", refused=r"mlp\.shared_expert"),
    "vit-img": Row("ViTForImageClassification", PICTURE, IMG, QV, ("classifier",)),
    "dinov2-img": Row("Dinov2ForImageClassification", PICTURE, IMG, QV, ("classifier",)),
    "swin-img (windows)": Row("SwinForImageClassification", SWIN, IMG, QV, ("classifier",), r"attention\S*[qv]_proj"),
    "t5-s2s": Row("T5ForConditionalGeneration", T5, S2S, ("q", "v")),
}


@dataclass(eq=False)
class Learner:
    """A row's model, as the engines want it."""

    net: nn.Module
    encoder: Encoder
    task: str | None
    sides: dict[str, list[nn.Parameter]]
    call: Any = None  # instead of the net itself, as when it is compiled
    asks: bool = False  # for the gradient of images, without which re-entrant checkpoints of a frozen stem have none

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.net.dtype).requires_grad_(self.asks)
        logits, labels = (self.net if self.call is None else self.call)(**inputs).logits.float(), batch["labels"]
        if self.task == LM:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if labels.dim() == 1:
            return F.cross_entropy(logits, labels, reduction="none")
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return each.sum(1) / (labels != -100).sum(1)

    def set_trainable(self, sides: str) -> list[nn.Parameter]:
        self.net.requires_grad_(False)
        chosen = [p for side in sides for p in self.sides[side]]
        for p in chosen:
            p.requires_grad_(True)
        return chosen


def build(row: Row, dropout: float = 0.0, lora_dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Learner:
    """The row's model; `dropout` is that of all its layers."""
    cls = getattr(transformers, row.cls)
    config = cls.config_class(**row.options, **({} if row.task in (LM, S2S) else {"num_labels": CLASSES}))
    for key, value in config.to_dict().items():
        if re.search("dropout|pdrop|drop_path", key) and isinstance(value, int | float):
            setattr(config, key, dropout)
    torch.manual_seed(0)
    targets = row.targets if isinstance(row.targets, str) else list(row.targets)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=lora_dropout, task_type=row.task)
    lora.modules_to_save = list(row.head) or None
    net = get_peft_model(cls(config).to(dtype), lora)
    sides: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "H": []}
    for name, p in net.named_parameters():
        if p.requires_grad:
            sides["A" if "lora_A" in name else "B" if "lora_B" in name else "H"].append(p)
    for p in sides["B"]:
        nn.init.normal_(p, std=0.3)  # so that A has a gradient
    net.train()
    pads: Any = SimpleNamespace(pad_token_id=getattr(config, "pad_token_id", 0))
    return Learner(net, Encoder(pads, Schema("text", ()), 32), row.task, sides)


def examples(row: Row) -> list[Example]:
    """Of different lengths, as many as fill a batch; images are all alike."""
    g = torch.Generator().manual_seed(1)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(3, high, shape, generator=g)

    def one(i: int) -> Example:
        if row.task is None:
            side = row.options["image_size"]
            return {"pixel_values": torch.randn(3, side, side, generator=g), "labels": torch.tensor(i % CLASSES)}
        ids = draw(WORDS, 12 - 2 * i)
        words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if row.task == CLS:
            return words | {"labels": torch.tensor(i % CLASSES)}
        if row.task == LM:
            return words | {"labels": ids}
        answer = draw(WORDS, 7 - i)
        return words | {"decoder_input_ids": torch.cat([torch.zeros(1).long(), answer[:-1]]), "labels": answer}

    return [one(i) for i in range(N)]


def apart(got: Gradients, wanted: Gradients) -> float:
    """The largest difference, over the largest number of its tensor."""
    pairs = zip(got, wanted, strict=True)
    return max(float((g - w).abs().max() / w.abs().max().clamp(min=1e-12)) for g, w in pairs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and PEFT say of such models."""
    import warnings

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
