"""Small federations to train in: a random transformer in memory, and clients whose examples differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.data.schema import Schema
from fedlora.encoding.client_data import ClientData
from fedlora.lora import LoRA
from fedlora.models import base_model
from fedlora.models.model import Model
from fedlora.sections import LoRAConfig, ModelConfig
from fedlora.server.rounds import Fleet

Kind = Literal["gpt2", "llama", "bert"]
Adapter = Literal["lora", "dora", "vera"]
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
    """One resident model as it is before training, with the data of its clients and the settings it was made from."""

    kind: Kind
    model: Model
    start: LoRA
    clients: tuple[ClientData, ...]
    config: ModelConfig
    lora: LoRAConfig
    schema: Schema

    @property
    def s(self) -> float:
        """The factor on B A, by its definition."""
        divisor = self.lora.rank**0.5 if self.lora.rslora else self.lora.rank
        return self.lora.alpha / divisor

    @property
    def batch(self) -> dict[str, Tensor]:
        """The held-out examples of client 0 as a batch."""
        return self.model.encoder.collate(self.clients[0].heldout)

    def logits(self) -> Tensor:
        """The logits of the batch under the adapter that is loaded: (n, classes or vocabulary)."""
        return self.logits_of(self.model.net)

    @torch.no_grad()
    def logits_of(self, net: nn.Module) -> Tensor:
        """The logits of the batch under any model of this kind: (n, classes or vocabulary)."""
        inputs = {k: v for k, v in self.batch.items() if k != "labels"}
        scores: Tensor = net.eval()(**inputs).logits
        return scores.flatten(0, -2)

    @cached_property
    def clean(self) -> nn.Module:
        """The base model, loaded afresh, without an adapter."""
        return base_model.load_base_model(self.config, self.schema, seed=0)[0]


def small_model(kind: Kind, adapter: Adapter = "lora", rank: int = RANK) -> SmallModel:
    """The model of this kind and its clients. There is one in a process, so it must be left with its base as it was."""
    return _small_model(kind, adapter, rank)


@cache
def _small_model(kind: Kind, adapter: Adapter, rank: int) -> SmallModel:
    schema = Schema("label", ("text", "label"), LABELS) if kind == "bert" else Schema("text", ("text",))
    config = ModelConfig(path=str(_folder(kind)), max_length=16, device="cpu")
    lora = replace(LORA[kind], rank=rank) if adapter == "lora" else LoRAConfig(kind=adapter, rank=rank)
    model = Model(config, lora, schema, seed=0)
    clients = tuple(_client_data(model, i) for i in range(len(RANKS)))
    return SmallModel(kind, model, model.get_adapter(), clients, config, lora, schema)


def _client_data(model: Model, client: int) -> ClientData:
    """Client 0 has 4 examples to train on, client 1 has 6, client 2 has 8; each holds 4 out."""
    return ClientData(model.encoder, _rows(client, 4 + 2 * client), _rows(10 + client, 4))


def _rows(client: int, n: int) -> list[dict[str, str]]:
    """Sentences in words that this client prefers, and labels that only it would give."""
    draw = Random(f"rows of client {client}")
    preferred = draw.sample(WORDS, 12)
    return [{"text": " ".join(draw.choices(preferred, k=8)), "label": LABELS[draw.randrange(2)]} for _ in range(n)]


@cache
def _folder(kind: Kind) -> Path:
    """The folder in which the random model is saved, as any pretrained one would be."""
    folder = Path(_temporary().name) / kind
    with seeds.seeded(0):
        _net(kind).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@cache
def _temporary() -> "TemporaryDirectory[str]":
    """A folder that is removed when the process ends."""
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
    """A tokenizer with one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    wrapper: Any = PreTrainedTokenizerFast  # untyped
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    return wrapper(tokenizer_object=inner, **names)
