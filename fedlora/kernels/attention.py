"""Attention of short rows, and of any rows under dropout, by plain products and a softmax on a CPU.

torch's `scaled_dot_product_attention` has one kernel for rows of any length there, which pays from some thirty tokens
on, and none for attention under dropout, which it computes by parts, with copies and torch's slow dropout. Here are
milliseconds of forward and backward (one thread of a Zen 3, float32):

    | rows x heads x tokens x width | torch's | these | torch's, dropout 0.1 | these |
    |-------------------------------|---------|-------|----------------------|-------|
    | 64 x 12 x 8 x 32              | 8.7     | 3.8   | 5.0                  | 5.2   |
    | 64 x 12 x 16 x 32             | 9.1     | 6.8   | 10.0                 | 8.9   |
    | 32 x 12 x 32 x 32             | 9.6     | 9.3   | 17.5                 | 11.0  |
    | 16 x 12 x 64 x 32             | 12.2    | 14.7  | 21.4                 | 13.9  |
    | 8 x 12 x 128 x 32             | 23.5    | 20.3  | 41.1                 | 33.7  |
    | 5 x 9 x 200 x 64              | 29.0    | 35.8  | 58.1                 | 39.4  |

So they are used up to SHORT tokens, or under dropout. The query of padding, which may look at nothing, gets the mean of
all values here and zeros there; neither is ever read.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedlora.lora import at_least_float32

from .dropout import dropout_mask, probability

SHORT = 32  # tokens up to which these are faster without dropout too


class _Attention(torch.autograd.Function):
    """softmax(scale q k^T) v of (n, tokens, width) each; `hidden` (rows, 1, tokens, tokens) says what is not seen."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, p: float) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        if hidden is not None:
            by_row = scores.view(len(hidden), -1, *scores.shape[1:])
            by_row.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1, dtype=at_least_float32(scores).dtype).to(q.dtype)
        mask = dropout_mask(weights, p) if p else None
        ctx.save_for_backward(q, k, v, weights, mask)
        ctx.scale = scale
        return torch.bmm(weights if mask is None else weights * mask, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, mask = ctx.saved_tensors
        (g,) = gradients
        to_v = torch.bmm((weights if mask is None else weights * mask).transpose(1, 2), g)
        to_weights = torch.bmm(g, v.transpose(1, 2))
        if mask is not None:
            to_weights.mul_(mask)
        wide, exact = at_least_float32(to_weights), at_least_float32(weights)
        to_scores = torch._softmax_backward_data(wide, exact, -1, exact.dtype).mul_(ctx.scale).to(q.dtype)
        return torch.bmm(to_scores, k), torch.bmm(to_scores.transpose(1, 2), q), to_v, None, None, None


@contextmanager
def quick_attention(net: nn.Module) -> Iterator[None]:
    """Let a network on a CPU attend in this way within the block, where it would call torch's function.

    Transformers looks the function up by name for all networks of a process, and so other networks do the same.
    """
    if next(net.parameters()).device.type != "cpu":
        yield
        return
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_attend, plain)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def _attend(
    plain: Callable[..., tuple[Tensor, None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' function for torch's attention returns: (rows, tokens, heads, width)."""
    dropout = probability(dropout)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not _pays(query, key, dropout) or not _known(query, key, attention_mask, others, causal=causal):
        return plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows, heads, tokens, width = query.shape
    q, k, v = (t.reshape(rows * heads, t.shape[2], t.shape[3]) for t in (query, key, value))
    scale = width**-0.5 if scaling is None else scaling
    out = _Attention.apply(q, k, v, _hidden(attention_mask, query, key, causal=causal), scale, dropout)  # type: ignore[no-untyped-call]
    return out.view(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


def _pays(query: Tensor, key: Tensor, p: float) -> bool:
    """Whether these are faster than torch's function."""
    return p > 0 or (query.shape[2] > 1 and key.shape[2] <= SHORT)


def _known(query: Tensor, key: Tensor, mask: Tensor | None, others: Mapping[str, Any], *, causal: bool) -> bool:
    """Whether these can compute what is asked: a mask is of truth values, or of whole rows, and nothing is added."""
    if any(others.get(name) is not None for name in ("position_bias", "cache", "softcap")):
        return False
    if mask is None:
        return not causal or query.shape[2] == key.shape[2]
    return mask.dtype == torch.bool


def _hidden(mask: Tensor | None, query: Tensor, key: Tensor, *, causal: bool) -> Tensor | None:
    """What a query does not see of the keys, (rows or 1, heads or 1, tokens, keys); None where it sees all."""
    if mask is not None:
        return ~mask
    if not causal:
        return None
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)[None, None]
