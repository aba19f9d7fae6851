"""Real transformers, small and random, saved as anybody's would be."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fedlora.data.schema import Schema
from fedlora.lora import LoRA
from fedlora.models.model import Model

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>"]
TEXT = Schema("text", ("text",))
LABEL = Schema("label", ("text", "label"), ("no", "maybe", "yes"))
IMAGE = Schema("image", ("image", "label"), ("no", "maybe", "yes"))
FORMS = {"llama": TEXT, "gpt2": TEXT, "bert": LABEL, "llama-cls": LABEL, "vit": IMAGE}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, with w0 ... w59."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def make(kind: str, folder: Path) -> Path:
    """Save a model of this kind with its processor; the folder can be given to --model."""
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    wide = small | {"intermediate_size": 40, "max_position_embeddings": 64}
    if kind in ("llama", "llama-tied"):
        model = LlamaForCausalLM(LlamaConfig(**wide, num_key_value_heads=1, tie_word_embeddings=kind == "llama-tied"))
    elif kind == "llama-cls":
        model = LlamaForSequenceClassification(LlamaConfig(**wide, num_labels=3))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=2, n_positions=64))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**wide, num_labels=3))
    else:
        config = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
        model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}) if kind == "vit" else tokenizer()
    processor.save_pretrained(folder)
    return folder


def batch(kind: str) -> dict[str, torch.Tensor]:
    """Something for a model of this kind to look at."""
    g = torch.Generator().manual_seed(5)
    if kind == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=g), "labels": torch.tensor([0, 1, 2, 0])}
    ids = torch.randint(4, 64, (4, 12), generator=g)
    labels = torch.tensor([0, 1, 2, 0]) if FORMS[kind].labels else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@torch.no_grad()
def logits(model: Model, kind: str) -> torch.Tensor:
    """The logits of that batch under the model with the adapter that it has."""
    model.net.eval()
    return model.logits(batch(kind))[0]


@torch.no_grad()
def plain_logits(net: torch.nn.Module, kind: str) -> torch.Tensor:
    """The same of a model that has nothing to do with us."""
    scores = net.eval()(**{k: v for k, v in batch(kind).items() if k != "labels"}).logits
    return scores if FORMS[kind].labels else scores[:, :-1].flatten(0, 1)


@torch.no_grad()
def computed(layer: torch.nn.Module) -> torch.Tensor:
    """The matrix that a linear layer multiplies by, whatever is inside it: (d_out, d_in)."""
    layer.eval()
    width = int(getattr(layer, "in_features", 0) or layer.nx)
    out: torch.Tensor = layer(torch.eye(width)) - layer(torch.zeros(1, width))
    return out.T


def random_adapter(model: Model, seed: int, rank: int = 3) -> LoRA:
    """A random adapter that fits the model, at any rank; of VeRA, at its own."""
    g = torch.Generator().manual_seed(seed)
    like = model.get_adapter()
    vera = model.kind == "vera"
    return LoRA(
        {m: torch.randn(a.shape if vera else (rank, a.shape[1]), generator=g) for m, a in like.A.items()},
        {m: 0.1 * torch.randn(b.shape if vera else (b.shape[0], rank), generator=g) for m, b in like.B.items()},
        {m: h + 0.1 * torch.randn(h.shape, generator=g) for m, h in like.H.items()},
    )
