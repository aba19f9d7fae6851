"""The last layer at the first token alone: scores and gradients are those of the whole layer."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedlora.kernels.attention import quick_attention
from fedlora.kernels.first_token import READERS, first_token_alone

SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 30}
SIZES |= {"num_attention_heads": 4, "num_labels": 3, "embedding_size": 24}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def classifier(name: str, **more: Any) -> nn.Module:
    config = getattr(transformers, name.replace("ForSequenceClassification", "Config"))(**SIZES, **more)
    torch.manual_seed(0)
    net: nn.Module = getattr(transformers, name)(config).double().train()
    return net


def scores_and_gradients(net: nn.Module, *, padded: bool) -> Tensor:
    """Of three rows of seven tokens: one vector."""
    ids = torch.arange(21).view(3, 7) % 25 + 3
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0 if padded else 1
    net.zero_grad()
    scores = net(input_ids=ids, attention_mask=mask).logits
    scores.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return torch.cat([t.flatten() for t in (scores, *gradients)]).detach()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(READERS))
def test_scores_and_gradients_are_those_of_the_whole_layer(name: str, padded: bool) -> None:
    net = classifier(name)
    whole = scores_and_gradients(net, padded=padded)
    with first_token_alone(net), quick_attention(net):
        alone = scores_and_gradients(net, padded=padded)
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)


def test_the_last_layer_computes_one_token_within_the_block_and_all_after_it() -> None:
    net: Any = classifier("BertForSequenceClassification")
    seen = []
    net.bert.encoder.layer[-1].register_forward_hook(lambda _m, _x, y: seen.append(y.shape[1]))
    for block in (first_token_alone(net), quick_attention(net)):
        with block:
            scores_and_gradients(net, padded=False)
    assert seen == [1, 7]


def test_a_model_that_reads_other_tokens_is_left_alone() -> None:
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    net = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0)
    )
    before = [dict(vars(module)) for module in net.modules()]
    with first_token_alone(net):
        assert [dict(vars(module)) for module in net.modules()] == before
