"""Examples: rows as tensors, with what became of each row on the way."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Example = dict[str, Tensor]
Records = Sequence[Sequence[Example]]  # a record may be several examples, as a long text is several blocks, or none
INPUTS = ("input_ids", "rejected_input_ids")  # of an example, where its tokens are; of a preference there are two
IGNORED = -100  # the label of a token that is not learned


def length(example: Example) -> int:
    """The count of an example's tokens, of a preference those of the longer row; 0 for an image: all are of a size."""
    return max((len(example[key]) for key in INPUTS if key in example), default=0)


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """What one row of the data became."""

    examples: Sequence[Example]  # none of a row with nothing to learn
    tokens: int = 0  # before anything was cut; 0 of an image
    unlearned_turns: int = 0  # of the assistant in a conversation, that its template leaves out or writes otherwise

    @property
    def cut(self) -> int:
        """The count of tokens that did not fit; of a row with nothing to learn, 0."""
        return self.tokens - sum(map(_tokens, self.examples)) if self.examples else 0

    @property
    def learned(self) -> int:
        """The count of predictions that its examples ask for."""
        return sum(map(_predictions, self.examples))


def _tokens(example: Example) -> int:
    """The count of an example's tokens, read or to be written."""
    return length(example) + len(example.get("decoder_input_ids", ()))


def _predictions(example: Example) -> int:
    if example["labels"].dim() == 0 or example["labels"].is_floating_point():  # a class, a number, several labels
        return 1
    first = 0 if "decoder_input_ids" in example else 1
    return int((example["labels"][first:] != IGNORED).sum())


def causal(ids: list[int], labels: list[int]) -> Iterator[Example]:
    """Yield an example for a language model, unless it has nothing to learn: the first token is never predicted."""
    if any(label != IGNORED for label in labels[1:]):
        yield {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), dtype=torch.int64),
            "labels": torch.tensor(labels),
        }
