"""How a base model behaves with text, found by asking it: does it run, does it look ahead, does padding change it?

Whoever loads a model can be told what its class is, but not this: a BERT is loaded as a language model too, and then
sees the very word that it is to predict; a model without attention masks reads the padding of its neighbours.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.encoding.encoder import IGNORED, Encoder, Example
from fedlora.errors import ModelError
from fedlora.seeds import seeded

SHORT, LONG = 5, 8  # tokens of the two rows that a model is asked about; model.max_length is never below 8
EXACT, ROUNDED = 1e-4, 5e-2  # share of the scores' size that counts as equal, with weights of 32 bits or fewer


def encoder_for(net: nn.Module, encoder: Encoder) -> Encoder:
    """The encoder, which makes batches of text as this model needs them.

    Raises `ModelError` as `needs_one_length` does, and for preferences and a model that needs rows of one length.
    """
    if encoder.schema.kind == "image":  # all are of one size
        return encoder
    asking = replace(encoder, schema=replace(encoder.schema, kind="text")) if not encoder.schema.has_head else encoder
    one_length = needs_one_length(net, asking)
    if one_length and encoder.schema.kind == "preference":
        raise ModelError(
            f"{_name(net)} gives a text other numbers with padding beside it, and the two answers of a preference, "
            "which are asked together, differ in length; choose another model"
        )
    return replace(encoder, limits=replace(encoder.limits, one_length=one_length))


def begin_training(net: nn.Module) -> None:
    """Set a model to train, but for its batch norms: the statistics in them belong to the base, which is frozen.

    In training they would take a row's numbers from its neighbours, and keep means that no adapter holds.
    """
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def needs_one_length(net: nn.Module, encoder: Encoder) -> bool:
    """Return whether padding changes what the model says of a row, so that a batch may hold rows of one length only.

    Raises `ModelError` for a model that cannot be run on plain text, that answers otherwise each time, or that is to
    learn every token by those before it and sees those after it too.
    """
    short, long = _example(encoder, SHORT), _example(encoder, LONG)
    net.eval()
    with seeded(0):
        alone, again = _scores(net, encoder, short), _scores(net, encoder, short)
        padded = _scores(net, encoder, short, long)
        begin_training(net)
        _scores(net, encoder, short)  # some architectures take fewer texts in training
    net.eval()
    limit = EXACT if all(p.dtype.itemsize >= 4 for p in net.parameters()) else ROUNDED
    if _gap(alone, again) > limit:
        raise ModelError(
            f"{_name(net)} gives the same text other numbers each time, so that what is delivered could not be held to "
            "what was evaluated; choose another model"
        )
    if not (encoder.schema.has_head or encoder.decoder_inputs):
        _refuse_what_looks_ahead(net, encoder, long, limit)
    return _gap(alone, padded) > limit


def _refuse_what_looks_ahead(net: nn.Module, encoder: Encoder, row: Example, limit: float) -> None:
    """Raise `ModelError` where the scores of most tokens change with the last token, which comes after them."""
    ids = row["input_ids"].clone()
    ids[-1] = ids[0]
    one, other = _scores(net, encoder, row), _scores(net, encoder, row | {"input_ids": ids, "labels": ids})
    change = (one - other)[:-1].abs().amax(1).median()  # of the tokens before it
    if float(change) > limit * float(one.abs().max()):
        raise ModelError(
            f"{_name(net)} is no causal language model: what it says of a token changes with the tokens after it, so "
            "that it would see what it is to predict; choose a causal model, or give it data with a label column"
        )


def _example(encoder: Encoder, n: int) -> Example:
    """An example of n tokens: ordinary ones, and the end token, as there are models that look for it."""
    tokenizer = encoder.processor
    known = min(len(tokenizer), encoder.limits.vocabulary or len(tokenizer))
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(known) if i not in special][-LONG:] or [0]
    ids = [ordinary[i % len(ordinary)] for i in range(n)]
    if tokenizer.eos_token_id is not None:
        ids[-1] = tokenizer.eos_token_id
    made: Example = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(n, dtype=torch.int64)}
    if encoder.schema.has_head:
        return made | {"labels": torch.tensor(0)}
    labels = made["input_ids"]
    return made | {"labels": labels} | _decoded(encoder, labels)


def _decoded(encoder: Encoder, labels: Tensor) -> Example:
    return {"decoder_input_ids": encoder.decoder_inputs(labels)} if encoder.decoder_inputs else {}


@torch.no_grad()
def _scores(net: Any, encoder: Encoder, *rows: Example) -> Tensor:
    """The scores of the first of these rows, asked in one batch: (classes,), or (its tokens, vocabulary).

    Raises `ModelError`, with the model's own words, where it cannot be run.
    """
    batch: dict[str, Any] = encoder.collate(list(rows))
    labels = batch.pop("labels")
    device = next(net.parameters()).device
    try:
        scores: Tensor = net(**{key: t.to(device) for key, t in batch.items()}).logits.float().cpu()
    except Exception as e:  # whatever the code of a model raises
        kind = str(net.dtype).removeprefix("torch.")
        raise ModelError(
            f"{_name(net)} cannot compute in model.dtype = {kind}: {type(e).__name__}: {e}; set model.dtype = float32"
            if kind != "float32"
            else f"{_name(net)} cannot be run on plain text: {type(e).__name__}: {e}; choose another model"
        ) from e
    return scores[0] if scores.dim() == 2 else scores[0][labels[0] != IGNORED]


def _gap(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the scores' size."""
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


def _name(net: Any) -> str:
    return type(net.get_base_model() if hasattr(net, "get_base_model") else net).__name__
