"""Prompts for a language model to answer, taken from examples as they are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .encoding import IGNORED, Encoder, Example
from .rows import Rows

UNCUT = 2**20  # tokens of an example of which nothing is cut


@dataclass(frozen=True, eq=False)
class Prompt:
    """All that comes before the last answer of an example, and that answer."""

    ids: Tensor  # (tokens,): what the model is given
    answer: Tensor  # (tokens,): what is expected of it, with the token that ends it


def prompts(encoder: Encoder, rows: Rows, *, apart: bool) -> list[Prompt]:
    """The prompt of every row that has an answer; one that is too long loses its left, but for the token it opens with.

    `apart`: the model is an encoder-decoder, whose examples hold the answer alone as labels. A prompt has at most
    `encoder.max_length` tokens, whatever the length of its answer.
    """
    whole = replace(encoder, max_length=UNCUT)
    examples = (example for of_row in whole.by_row(rows) for example in of_row[-1:])
    found = [prompt_of(example, apart=apart) for example in examples]
    first = getattr(encoder.processor, "bos_token_id", None)
    return [replace(p, ids=_cut(p.ids, encoder.max_length, first)) for p in found if len(p.ids)]


def prompt_of(example: Example, *, apart: bool = False) -> Prompt:
    """What comes before the last run of learned tokens in an example, and that run; or its input, and its labels."""
    labels = example["labels"]
    learned = labels != IGNORED
    if apart:
        return Prompt(example["input_ids"], labels[learned])
    end = int(learned.nonzero()[-1]) + 1
    given = (~learned[:end]).nonzero()
    start = int(given[-1]) + 1 if len(given) else 0
    return Prompt(example["input_ids"][:start], labels[start:end])


def _cut(ids: Tensor, size: int, first: int | None) -> Tensor:
    """At most `size` tokens: the last ones, and before them the token that opens a text, where it is there."""
    if len(ids) <= size:
        return ids
    kept = ids[: int(ids[0] == first)]
    return torch.cat([kept, ids[len(ids) - size + len(kept) :]])


def padded(prompts: Sequence[Prompt], padding: int, side: str) -> dict[str, Tensor]:
    """A batch of prompts of one length, padded on the left or the right: (prompts, tokens)."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(width - len(prompt.ids), width) if side == "left" else slice(len(prompt.ids))
        ids[i, place], mask[i, place] = prompt.ids, 1
    return {"input_ids": ids, "attention_mask": mask}
