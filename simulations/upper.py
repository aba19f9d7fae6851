"""An encoder of which only the last layers are adapted: what the frozen ones below make of a text is worked out once.

It is the same model with the same adapter, but that the layers below have no dropout; a step costs as much less as
there are fewer layers in it. Everything that was seen stays in memory: of 64,000 short sentences 1.3 GB.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from fedlora.errors import ConfigError
from fedlora.model import Model

PAD = 0  # [PAD] of every BERT


def remember(model: Model, path: str, layers: int) -> None:
    """Let this model, a BERT from `path`, work out its first `layers` layers once for every text.

    Raises `ConfigError` where one of them is adapted.
    """
    low = [name for name in model.adapted for i in range(layers) if f".layer.{i}." in f".{name}"]
    if low:
        raise ConfigError(f"{low[0]} is adapted, and lies below layer {layers}; set lora.targets to those above")
    whole: Any = model.net
    bert = whole.get_base_model().bert
    bert.embeddings = Remembered(AutoModel.from_pretrained(path, num_hidden_layers=layers, add_pooling_layer=False))
    for i in range(layers):
        bert.encoder.layer[i] = _Through()


class Remembered(nn.Module):
    """What stands for a BERT's embeddings: its states after the frozen layers."""

    def __init__(self, below: Any) -> None:
        super().__init__()
        self._below = [below.eval().requires_grad_(False)]  # in a list, as it is no part of the model that is trained
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """(n, tokens) to (n, tokens, width)."""
        each = [tuple(int(i) for i in row if i != PAD) for row in input_ids.tolist()]
        fresh = [i for i, ids in enumerate(each) if ids not in self._known]
        if fresh:
            self._look(input_ids[fresh], [each[i] for i in fresh])
        return pad_sequence([self._known[ids] for ids in each], batch_first=True)

    @torch.no_grad()
    def _look(self, input_ids: Tensor, each: list[tuple[int, ...]]) -> None:
        (below,) = self._below
        states = below(input_ids=input_ids, attention_mask=(input_ids != PAD).long()).last_hidden_state
        for ids, row in zip(each, states, strict=True):
            self._known[ids] = row[: len(ids)].clone()


class _Through(nn.Module):
    """What stands for a layer that is remembered."""

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states
