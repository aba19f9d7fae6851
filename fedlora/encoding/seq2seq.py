"""Prompts and responses for an encoder-decoder: the encoder reads the prompt, the decoder writes the response."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from .examples import IGNORED, EncodedRow, Example
from .tokens import usable

DecoderInputs = Callable[[Tensor], Tensor]  # what a decoder sees when it is to write these tokens


@dataclass(frozen=True, eq=False)
class Seq2Seq:
    """Makes the examples of an encoder-decoder."""

    tokenizer: Any
    max_length: int
    decoder_inputs: DecoderInputs

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Iterator[EncodedRow]:
        """Yield one example a row.

        Prompt and response have the special tokens that the tokenizer gives them, and each is cut at its end where it
        is too long; a response that was cut does not teach the model to stop there.
        """
        sources, asked = self._ids([usable(text) for text in prompts])
        targets, said = self._ids(text_target=[usable(text) for text in responses])
        for source, target, before, after in zip(sources, targets, asked, said, strict=True):
            yield EncodedRow(tuple(self._example(source, target, cut=after > len(target))), before + after)

    def _ids(self, *texts: Any, **named: Any) -> tuple[list[list[int]], list[int]]:
        """The tokens of every text, cut to the longest allowed, and how many it had before."""
        cut = self.tokenizer(*texts, truncation=True, max_length=self.max_length, **named)["input_ids"]
        whole = self.tokenizer(*texts, verbose=False, **named)["input_ids"]
        return cut, [len(ids) for ids in whole]

    def _example(self, source: list[int], target: list[int], *, cut: bool) -> Iterator[Example]:
        """Yield the example of a prompt and a response in tokens, unless it has nothing to learn."""
        special = self.tokenizer.all_special_ids
        ids = torch.tensor(source or [self.tokenizer.pad_token_id])
        written = torch.tensor(target, dtype=torch.int64)
        closing = len(list(takewhile(special.__contains__, reversed(target)))) if cut else 0
        labels = torch.cat([written[: len(target) - closing], torch.full((closing,), IGNORED)])
        if bool((labels != IGNORED).any()):
            yield {
                "input_ids": ids,
                "attention_mask": torch.ones(len(ids), dtype=torch.int64),
                "decoder_input_ids": self.decoder_inputs(written),
                "labels": labels,
            }
