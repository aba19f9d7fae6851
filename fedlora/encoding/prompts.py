"""Prompts for a language model to answer: rows with answers, written as they are trained on, up to the last answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.data.conversations import conversation
from fedlora.data.rows import Rows

from .answers import start_of_last
from .encoder import IGNORED, Encoder


@dataclass(frozen=True, eq=False)
class Prompt:
    """What comes before the last answer of a row, and that answer."""

    ids: Tensor  # (tokens,): what the model is given
    expected: str  # the answer, as it stands in the data
    answer: tuple[int, ...]  # its tokens as they are trained on, with the one that ends it


def prompts(encoder: Encoder, rows: Rows) -> list[Prompt]:
    """The prompt of every row that has one, of at most `encoder.max_length` tokens, whatever the length of its answer.

    One that is too long loses its left, but for the token that opens a text; an encoder-decoder's loses its right, as
    in training.
    """
    if not encoder.decoder_inputs:
        found = (_continued(encoder, row) for row in rows)
        return [prompt for prompt in found if len(prompt.ids)]  # a conversation may begin with its answer
    encoded = zip(rows, encoder.by_row(rows), strict=True)
    pairs = ((row, example) for row, examples in encoded for example in examples)
    return [Prompt(e["input_ids"], _expected(encoder, row), _learned(e["labels"])) for row, e in pairs]


def _continued(encoder: Encoder, row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row in which prompt and answer are one text."""
    written = encoder.answers.write(row)
    start = start_of_last(written.learned)
    rest = zip(written.ids[start:], written.learned[start:], strict=True)
    answer = tuple(token for token, is_learned in rest if is_learned)
    opening = getattr(encoder.processor, "bos_token_id", None)
    ids = shortened(torch.tensor(written.ids[:start], dtype=torch.int64), encoder.max_length, opening)
    return Prompt(ids, _expected(encoder, row), answer)


def _expected(encoder: Encoder, row: Mapping[str, Any]) -> str:
    """The text of the last answer in a row."""
    said = conversation(encoder.schema, row).learned
    answers = [message["content"] for message in said if message["role"] == "assistant"]
    return str(answers[-1]).strip()


def _learned(labels: Tensor) -> tuple[int, ...]:
    return tuple(labels[labels != IGNORED].tolist())


def shortened(ids: Tensor, size: int, opening: int | None) -> Tensor:
    """At most `size` tokens: the last ones, and before them the one that opens a text, where it is there."""
    kept = ids[: int(ids[:1].tolist() == [opening])]
    return ids if len(ids) <= size else torch.cat([kept, ids[len(ids) - size + len(kept) :]])


def padded(prompts: Sequence[Tensor], padding: int, side: str) -> dict[str, Tensor]:
    """A batch of prompts of one length, padded on the left or the right: (prompts, tokens)."""
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=padding, padding_side=side)
    ones = [torch.ones_like(prompt) for prompt in prompts]
    return {"input_ids": ids, "attention_mask": torch.nn.utils.rnn.pad_sequence(ones, True, 0, side)}
