"""Small, random encoder-decoders, saved as anybody's would be."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.models import tokenizer

KINDS = ("t5", "bart", "mbart", "blenderbot")


def make(kind: str, folder: Path) -> Path:
    """Save a model of this kind with its tokenizer, of a word a token; the folder can be given to --model."""
    torch.manual_seed(0)
    model: Any = _t5() if kind == "t5" else _bart(kind)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _t5() -> Any:
    config: Any = transformers.T5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart(kind: str) -> Any:
    name = {"bart": "Bart", "mbart": "MBart", "blenderbot": "BlenderbotSmall"}[kind]
    wide = {"vocab_size": 64, "d_model": 24, "max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 3}
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIZES.items()}
    config = getattr(transformers, f"{name}Config")(**wide, **layers, bos_token_id=2, decoder_start_token_id=3)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
