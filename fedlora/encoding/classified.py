"""Texts, or pairs of texts, as the inputs of a classifier."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import DataError

from .input_limits import InputLimits
from .tokens import any_of, usable


@dataclass(frozen=True)
class ClassifiedText:
    """One row's inputs, (tokens,) each, and how many tokens it had before it was cut."""

    inputs: Mapping[str, Tensor]
    tokens: int


@dataclass(frozen=True, eq=False)
class TextInputs:
    """Makes the inputs of a classifier, as its tokenizer gives them and its model takes them."""

    tokenizer: Any
    limits: InputLimits
    max_length: int

    def __call__(self, columns: Sequence[Sequence[str]]) -> Iterator[ClassifiedText]:
        """Yield the inputs of every row of the texts in one column, or in two."""
        columns = [[usable(text) for text in column] for column in columns]
        got = {**self.tokenizer(*columns, verbose=False)}
        counts = [len(ids) for ids in got["input_ids"]]
        self._fit(got, columns)
        written = any_of(self.tokenizer.convert_ids_to_tokens(sorted(self.limits.places)))
        for i, texts in enumerate(zip(*columns, strict=True)):
            one = {key: values[i] for key, values in got.items()}
            if any(written.search(text) for text in texts):
                one = {key: value for key, value in self._as_text(texts).items() if key in one}
            self.limits.refuse(self.tokenizer, one["input_ids"], texts[0], max_length=self.max_length)
            inputs = self._filled(one)
            yield ClassifiedText(inputs, max(counts[i], len(inputs["input_ids"])))

    def _fit(self, got: dict[str, list[list[int]]], columns: Sequence[Sequence[str]]) -> None:
        """Cut what is too long as the tokenizer does, and leave out types of tokens if the model does not take them."""
        too_long = [i for i, ids in enumerate(got["input_ids"]) if len(ids) > self.max_length]
        cut = self._tokenized(*([column[i] for i in too_long] for column in columns)) if too_long else {}
        for key, values in cut.items():
            for i, value in zip(too_long, values, strict=True):
                got[key][i] = value
        if not self.limits.takes(got.get("token_type_ids", ())):
            got.pop("token_type_ids", None)

    def _tokenized(self, *texts: Any, **options: Any) -> dict[str, Any]:
        return {**self.tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False, **options)}

    def _as_text(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """One row's inputs, with no token in its texts by which the model would find where they end."""
        got = self._tokenized(*texts, split_special_tokens=True, return_special_tokens_mask=True)
        unknown = self.tokenizer.unk_token_id
        own = got.pop("special_tokens_mask")
        written = [i in self.limits.places and not special for i, special in zip(got["input_ids"], own, strict=True)]
        if any(written) and unknown is None:
            raise DataError(
                f'"{texts[0][:40]}" has a special token of the model in it, by which the model finds where a text '
                "ends; take it out"
            )
        ids = [unknown if is_written else i for i, is_written in zip(got["input_ids"], written, strict=True)]
        return got | {"input_ids": ids}

    def _filled(self, one: Mapping[str, list[int]]) -> dict[str, Tensor]:
        """The inputs as tensors; a text without tokens is one token, of which the model can make something."""
        ids = [*one["input_ids"]] or [self._one_token()]
        inputs = {key: torch.tensor([*values] or [0], dtype=torch.int64) for key, values in one.items()}
        seen = {"attention_mask": torch.ones(len(ids), dtype=torch.int64)} if not one["input_ids"] else {}
        return {"attention_mask": torch.ones(len(ids), dtype=torch.int64), **inputs, **seen} | {
            "input_ids": torch.tensor(ids, dtype=torch.int64)
        }

    def _one_token(self) -> int:
        t = self.tokenizer
        return next((i for i in (t.bos_token_id, t.eos_token_id, t.pad_token_id) if i is not None), 0)
