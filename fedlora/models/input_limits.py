"""What a base model can take as text: how many tokens, which of them, and on which side a batch is padded."""

import re
from collections.abc import Iterator
from inspect import signature
from typing import Any

from torch import nn

from fedlora.data.schema import Schema
from fedlora.encoding.input_limits import NO_LIMITS, InputLimits
from fedlora.encoding.tokens import around
from fedlora.errors import ModelError, cut

POSITIONS = re.compile(r"(wpe|w_pos|embed_positions?|positions?_embed(ding)?s?|pos_(encoding|embeddings?))$")
OTHER_INPUT = re.compile(r"vision|visual|image|audio|speech")  # a part of the model that reads no text
SEGMENTS = ("xlnet", "funnel", "tapas")  # tell token types apart without a table of so many rows


def input_limits(net: Any, tokenizer: Any, schema: Schema) -> InputLimits:
    """The limits of a base model for the texts of a schema; none for images.

    Raises `ModelError` for a classifier whose answer for a text would depend on what it is batched with.
    """
    if schema.kind == "image":
        return NO_LIMITS
    if not schema.has_head:
        return InputLimits(positions=positions(net), vocabulary=vocabulary(net), token_types=_token_types(net))
    _refuse_unfit(net, tokenizer)
    end = {net.config.eos_token_id} if net.config.is_encoder_decoder else set()
    return InputLimits(
        positions=positions(net),
        vocabulary=vocabulary(net),
        token_types=_token_types(net),
        pads_left=getattr(net.config, "summary_type", "") == "last",
        places=frozenset({tokenizer.pad_token_id} | end),
    )


def vocabulary(net: Any) -> int | None:
    """The count of tokens that the model has a row for, to read and to write them; None if it has no such table."""
    try:
        tables = [net.get_input_embeddings(), net.get_output_embeddings()]
    except (NotImplementedError, AttributeError):  # a model that makes its embeddings of characters, or of hashes
        return None
    rows = [len(table.weight) for table in tables if isinstance(getattr(table, "weight", None), nn.Parameter)]
    return min(rows, default=None)


def positions(net: nn.Module) -> int | None:
    """The count of tokens that the model has a place for; None if it has no table of positions, and takes any count."""
    return min(_positions(net), default=None)


def warnings(net: Any, tokenizer: Any, schema: Schema, *, max_length: int) -> tuple[str, ...]:
    """What may be wrong with the longest examples, or with the tokenizer, as sentences; nothing of images."""
    if schema.kind == "image":
        return ()
    return (*_of_length(net, tokenizer, max_length), *_of_words(net, tokenizer))


def _of_length(net: Any, tokenizer: Any, max_length: int) -> Iterator[str]:
    trained, most = getattr(net.config.get_text_config(), "max_position_embeddings", None), positions(net)
    if most is not None and most < max_length:
        yield f"model.max_length = {max_length} is above the {most} positions of the model: a longer text is refused"
    elif isinstance(trained, int) and 0 < trained < max_length:
        yield f"model.max_length = {max_length} is above the {trained} tokens that the model was made for"
    if (made_for := tokenizer.model_max_length) < max_length:
        yield f"model.max_length = {max_length} is above the {made_for} tokens that the tokenizer is made for"


def _of_words(net: Any, tokenizer: Any) -> Iterator[str]:
    rows = vocabulary(net)
    added = () if rows is None else tokenizer.get_vocab().items()
    unknown = sorted((i, token) for token, i in added if i >= (rows or 0) and i != tokenizer.pad_token_id)
    if unknown:
        yield (
            f"the tokenizer has {len(unknown)} token(s) that the model has no embedding for, from "
            f'"{cut(unknown[0][1], 20)}" on: an example with one of them is refused'
        )


def _positions(net: nn.Module) -> Iterator[int]:
    """Yield how many tokens each table of positions in a text has a place for."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Embedding) and _is_of_positions(name):
            yield module.num_embeddings - _offset(module)
    for name, buffer in net.named_buffers():
        if buffer.dim() == 2 and buffer.is_floating_point() and _is_of_positions(name):
            yield len(buffer)


def _is_of_positions(name: str) -> bool:
    return POSITIONS.match(name.rpartition(".")[2]) is not None and OTHER_INPUT.search(name) is None


def _offset(table: nn.Embedding) -> int:
    """The count of rows before that of the first token: OPT and BART leave two, RoBERTa those up to the pad token's."""
    before = getattr(table, "offset", None)
    if isinstance(before, int):
        return before
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _token_types(net: Any) -> int | None:
    """How many types of token the model tells apart; None: as many as its tokenizer names."""
    if "token_type_ids" not in signature(net.forward).parameters:
        return 0
    if net.config.model_type in SEGMENTS:
        return None
    return int(getattr(net.config, "type_vocab_size", 0))  # others, as GPT-2, would add the embedding of a word


def _refuse_unfit(net: Any, tokenizer: Any) -> None:
    """Raise `ModelError` for a classifier of texts that cannot tell them from what pads them, or where they end."""
    if "attention_mask" not in signature(net.forward).parameters:
        raise ModelError(
            f"{type(net).__name__} takes no attention mask: its answer for a text would depend on the texts beside it; "
            "choose another model"
        )
    end = net.config.eos_token_id
    if net.config.is_encoder_decoder and end not in around(tokenizer)[1]:
        raise ModelError(
            f"{type(net).__name__} classifies by the end token of a text (token {end}), which the tokenizer of "
            f"{tokenizer.name_or_path} does not put there; take the tokenizer that belongs to the model"
        )
