"""Attention by plain products is that of torch, with its gradients, for causal and other models, padded or not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedlora.kernels.attention import SHORT, _attend, quick_attention
from fedlora.kernels.dropout import drawing_from, dropout_mask
from fedlora.seeds import seeded

SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 30}


def bert(dropout: float = 0.0) -> nn.Module:
    made = BertConfig(num_attention_heads=4, attention_probs_dropout_prob=dropout, hidden_dropout_prob=0.0, **SIZES)
    return BertModel(made).double()


def llama() -> nn.Module:  # of grouped queries
    return LlamaModel(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)).double()


def state(net: nn.Module, length: int, *, padded: bool) -> Tensor:
    """What the network says of three rows, where they are no padding, and the gradients of it: one vector."""
    ids = torch.arange(3 * length).view(3, length) % 30
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0 if padded else 1
    net.zero_grad()
    out = net(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    out.square().sum().backward()
    return torch.cat([out.flatten(), *(p.grad.flatten() for p in net.parameters() if p.grad is not None)]).detach()


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("padded", [False, True])
def test_short_rows_have_torchs_numbers_and_gradients(make: Any, padded: bool) -> None:
    with seeded(0):
        net = make()
    plain = state(net, 7, padded=padded)
    with quick_attention(net):
        torch.testing.assert_close(state(net, 7, padded=padded), plain, rtol=1e-5, atol=1e-5)  # Llama's norms: float32


@pytest.mark.parametrize("length", [7, SHORT + 8])
def test_under_dropout_weights_are_dropped_and_the_rest_is_as_ever(length: int) -> None:
    with seeded(1):
        q, k, v = (torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with seeded(2):
        mask = dropout_mask(torch.empty(6, length, length, dtype=torch.float64), 0.3).view(2, 3, length, length)
    wanted = (torch.softmax(0.5 * q @ k.transpose(2, 3), -1) * mask) @ v
    with seeded(2):
        got, _ = _attend(sdpa_attention_forward, nn.Module(), q, k, v, None, dropout=0.3, is_causal=False)
    torch.testing.assert_close(got.transpose(1, 2), wanted)
    gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, wanted)]
    torch.testing.assert_close(*gradients)


def test_longer_rows_without_dropout_and_whatever_is_unknown_go_to_torch() -> None:
    q = torch.randn(1, 2, SHORT + 1, 4)
    short = q[:, :, :4]
    bias = torch.zeros(1, 1, 4, 4)
    for args, kwargs in (((q, q, q, None), {}), ((short, short, short, bias), {}), ((short, q, q, None), {})):
        got, _ = _attend(told, nn.Module(), *args, **kwargs)
        assert got is TOLD


TOLD = torch.zeros(())


def told(*_: Any, **__: Any) -> tuple[Tensor, None]:
    return TOLD, None


def test_in_half_precision_the_softmax_is_not() -> None:
    with seeded(3):
        q, k, v = (torch.randn(2, 3, 9, 4) for _ in range(3))
    half = [t.bfloat16() for t in (q, k, v)]
    got, _ = _attend(sdpa_attention_forward, nn.Module(), *half, None, is_causal=True)
    wanted, _ = sdpa_attention_forward(nn.Module(), *(t.float() for t in half), None, is_causal=True)
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


def test_the_function_is_torchs_again_after_the_block() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ValueError, match="here"), quick_attention(nn.Linear(1, 1)):
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
        raise ValueError("here")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_of_one_query_too_dropout_is_drawn_from_the_generator_that_a_block_names() -> None:
    """As of the first token alone in BERT's last layer; torch's own function draws from the global one."""
    module, query, key = nn.Module(), torch.rand(3, 4, 1, 6), torch.rand(3, 4, 9, 6)
    with drawing_from(torch.Generator().manual_seed(1)):
        before = torch.get_rng_state()
        found = [_attend(sdpa_attention_forward, module, query, key, key, None, 0.5, is_causal=False)[0] for _ in "ab"]
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(*found)
