"""The last layer of an encoder at the first token alone, where a classifier reads nothing else of it.

BERT's classifier reads the output of the first token. So its last layer needs keys and values of all tokens, and of the
first one alone the query, the attention and all that comes after. Of MiniLM's six layers that saves a seventh of all
products of a training step; the scores are the same, and so are the gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .replaced import forwards_of

READERS = {  # classifiers of transformers that read the first token, and whose layers are written as BERT's
    f"{name}ForSequenceClassification" for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
}


@contextmanager
def first_token_alone(net: nn.Module) -> Iterator[None]:
    """Let the last layer of such a classifier compute its first token alone within the block; others stay as they are.

    The encoder's own output has one token then, so within the block nothing but the classifier's scores may be read.
    """
    layers = _last_layer(net)
    if layers is None:
        yield
        return
    attention, output = layers.attention.self, layers.attention.output
    with forwards_of({attention: partial(_attend, attention), output: partial(_after_attention, output.forward)}):
        yield


def _last_layer(net: nn.Module) -> Any:
    """The last layer of the encoder, where its first token alone is read; else None."""
    reader: Any = next((module for module in net.modules() if type(module).__name__ in READERS), None)
    if reader is None:
        return None
    config = reader.config
    plain = config._attn_implementation == "sdpa" and not config.is_decoder and not config.chunk_size_feed_forward
    return reader.base_model.encoder.layer[-1] if plain else None


def _attend(
    attention: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **others: Any
) -> tuple[Tensor, Tensor | None]:
    """What the first token attends to: (rows, 1, d), of hidden states (rows, tokens, d)."""
    others.pop("past_key_values", None)  # of decoders
    rows = len(hidden_states)

    def heads(layer: Any, x: Tensor) -> Tensor:  # (rows, heads, tokens, width)
        y: Tensor = layer(x)
        return y.view(rows, x.shape[1], -1, attention.attention_head_size).transpose(1, 2)

    q = heads(attention.query, hidden_states[:, :1])
    k, v = heads(attention.key, hidden_states), heads(attention.value, hidden_states)
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    p = attention.dropout.p if attention.training else 0.0
    out, weights = attend(attention, q, k, v, mask, dropout=p, scaling=attention.scaling, **others)
    return out.reshape(rows, 1, -1), weights


def _after_attention(plain: Callable[[Tensor, Tensor], Tensor], attended: Tensor, inputs: Tensor) -> Tensor:
    """The output of attention with what goes round it, of the first token."""
    return plain(attended, inputs[:, :1])
