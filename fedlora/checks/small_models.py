"""Small federations to train in: a random transformer in memory, and clients whose examples differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.data.client_data import ClientData
from fedlora.data.schema import Schema
from fedlora.lora import LoRA
from fedlora.models import base_model
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from fedlora.server.rounds import Fleet

Kind = Literal["gpt2", "llama", "bert"]
KINDS: tuple[Kind, ...] = ("gpt2", "llama", "bert")
Fleets = Callable[[Model, Sequence[ClientData], Sequence[int], Path], Fleet]
RANK = 2
RANKS = (RANK, RANK, RANK)
LORA = {  # in none of them s = 1
    "gpt2": LoRAConfig(rank=RANK, alpha=3.0, targets=("c_attn", "c_fc")),  # Conv1D: weights lie transposed
    "llama": LoRAConfig(rank=RANK, alpha=1.0, rslora=True),  # grouped queries: value is not square
    "bert": LoRAConfig(rank=RANK, alpha=5.0),  # a head is trained too
}
SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>"]
WORDS = [f"w{i}" for i in range(28)]
LABELS = ("no", "yes")


@dataclass(frozen=True, eq=False)
class SmallModel:
    """One resident model as it is before training, and what is known of it."""

    model: Model
    start: LoRA
    clients_data: tuple[ClientData, ...]
    config: ModelConfig
    lora: LoRAConfig
    form: Schema

    @property
    def s(self) -> float:
        """The factor on B A, by its definition."""
        return self.lora.alpha / (self.lora.rank**0.5 if self.lora.rslora else self.lora.rank)

    @property
    def batch(self) -> dict[str, Tensor]:
        """Some examples."""
        return self.model.encoder.collate(self.clients_data[0].heldout)

    def logits(self) -> Tensor:
        """What the model says of them, as it is worn: (n, classes or vocabulary)."""
        return self.of(self.model.net)

    @torch.no_grad()
    def of(self, net: nn.Module) -> Tensor:
        """What any model of this kind says of them."""
        inputs = {k: v for k, v in self.batch.items() if k != "labels"}
        scores: Tensor = net.eval()(**inputs).logits
        return scores.flatten(0, -2)

    @cached_property
    def clean(self) -> nn.Module:
        """The base, loaded afresh, with nothing on it."""
        return base_model.load_base_model(self.config, self.form, seed=0)[0]


@cache
def world(kind: Kind, adapter: Literal["lora", "dora", "vera"] = "lora") -> SmallModel:
    """The federation of this kind; one in a process, so it must be left with the base as it was."""
    form = Schema("label", ("text", "label"), LABELS) if kind == "bert" else Schema("text", ("text",))
    config = ModelConfig(path=str(_folder(kind)), max_length=16, device="cpu")
    lora = LORA[kind] if adapter == "lora" else LoRAConfig(kind=adapter, rank=RANK)
    model = Model(config, lora, form, seed=0)
    clients_data = tuple(ClientData(model.encoder, _rows(i, 4 + 2 * i), _rows(10 + i, 4)) for i in range(len(RANKS)))
    return SmallModel(model, model.get_adapter(), clients_data, config, lora, form)


def _rows(client: int, n: int) -> list[dict[str, str]]:
    """Sentences in words that this client prefers, and labels that only it would give."""
    draw = Random(f"rows of client {client}")
    some = draw.sample(WORDS, 12)
    return [{"text": " ".join(draw.choices(some, k=8)), "label": LABELS[draw.randrange(2)]} for _ in range(n)]


@cache
def _folder(kind: Kind) -> Path:
    """Where the model is saved as anybody's would be."""
    folder = Path(_temporary().name) / kind
    with seeds.seeded(0):
        _net(kind).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@cache
def _temporary() -> "TemporaryDirectory[str]":
    """Goes with the process."""
    return TemporaryDirectory(prefix="fedlora-check-")


def _net(kind: Kind) -> Any:
    import transformers

    t: Any = transformers  # its configurations are typed, and reject a dict of keywords
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    wide = small | {"intermediate_size": 40, "max_position_embeddings": 32}
    if kind == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
        )
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**wide, num_key_value_heads=1))
    return t.BertForSequenceClassification(t.BertConfig(**wide, num_labels=len(LABELS)))


def _tokenizer() -> Any:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    wrapper: Any = PreTrainedTokenizerFast  # untyped
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return wrapper(tokenizer_object=inner, **names)
