"""Rows encoded as tensors: the inputs of the model, and the tokens or classes that it is to learn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, groupby, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedlora.data.conversations import conversation
from fedlora.data.images import encode_image
from fedlora.data.rows import Rows
from fedlora.data.schema import Schema
from fedlora.data.targets import encoded_target
from fedlora.errors import DataError

from . import preferences
from .answers import AnswerWriter, ended, opened
from .classified import TextInputs
from .examples import IGNORED as IGNORED
from .examples import EncodedRow, causal
from .examples import Example as Example
from .examples import Records as Records
from .examples import length as length
from .input_limits import NO_LIMITS, InputLimits
from .lazy import examples_of
from .packed import UnpackableError, in_memory, pack
from .row_cache import EncodingRules, RowCache
from .seq2seq import DecoderInputs, Seq2Seq
from .tokens import around, ending, ids_of, refusals

SHORTEST = 8  # tokens of the last block of a long text


@dataclass(frozen=True, eq=False)
class Encoder:
    """Encodes rows of one schema as examples for one model."""

    processor: Any  # a tokenizer, or an image processor
    schema: Schema
    max_length: int
    decoder_inputs: DecoderInputs | None = None  # of an encoder-decoder: what its decoder sees of targets
    limits: InputLimits = NO_LIMITS
    channels: int = 3  # of an image
    with_reference: Callable[[list[Example]], list[Example]] | None = None  # adds what the base says of preferences
    cache: RowCache = field(default_factory=RowCache)  # of rows that were encoded before

    def __call__(self, rows: Rows, named: str = "examples") -> list[Example]:
        """The examples of all rows, without padding; an error calls the rows as they are named.

        An example for a language model has input_ids, attention_mask and labels, each (tokens,), with labels = -100
        where nothing is to be learned; a long text gives several examples, a row with nothing to learn none. One for an
        encoder-decoder has the prompt in input_ids, and decoder_input_ids as long as its labels. One for a
        classifier has what its tokenizer gives, (tokens,), or pixel_values (channels, height, width), and labels, a
        scalar. Raises `DataError` for rows that cannot be encoded, or if none has anything to learn.
        """
        return list(self.examples(rows, named))

    def examples(self, rows: Rows, named: str = "examples") -> Sequence[Example]:
        """The same, each made when it is asked for."""
        examples = examples_of(self.complete(self.encoded(rows)))
        if len(rows) and not examples:
            raise DataError(
                f"of {len(rows)} {named} none has a token to learn within {self.max_length}; "
                "raise model.max_length, or look whether they are empty"
            )
        return examples

    def by_row(self, rows: Rows) -> list[list[Example]]:
        """The examples of each row; see `__call__`."""
        return [list(row.examples) for row in self.complete(self.encoded(rows))]

    def encoded(self, rows: Rows) -> Sequence[EncodedRow]:
        """Each row's examples, if it has any, and what was cut of it. Raises `DataError` as `__call__` does.

        Texts lie packed, in memory or in the cache's file, and are unpacked when they are asked for.
        """
        if not len(rows):  # some tokenizers take no empty list
            return []
        encode = partial(_seq2seq if self.decoder_inputs else KINDS[self.schema.kind], self)
        with refusals():
            if self.schema.kind != "image":
                with suppress(UnpackableError):  # of a tokenizer with inputs of its own
                    return self.cache.encoded(self._rules, rows, encode)
            return [*encode(rows)]

    def complete(self, rows: Sequence[EncodedRow]) -> Sequence[EncodedRow]:
        """The rows as they are trained on: with what the base says of preferences, which is not cached."""
        if self.schema.kind != "preference" or self.with_reference is None:
            return rows
        completed = iter(self.with_reference(list(examples_of(rows))))
        return in_memory([pack(replace(row, examples=[*islice(completed, len(row.examples))])) for row in rows])

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch, padded to its longest example: (examples, tokens), or images and classes stacked.

        Of preferences it has two rows an example: all chosen answers, and then all rejected ones.
        """
        rows = preferences.as_rows(examples) if self.schema.kind == "preference" else examples
        return {key: self._batched(key, [row[key] for row in rows]) for key in rows[0]}

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
        """Yield batches of at most `size` examples of like lengths, or of one length where the model needs that."""
        ordered = sorted(examples, key=length)  # the sum over all is the same, with less padding
        for group in _by_length(ordered) if self.limits.one_length else [ordered]:
            yield from (group[i : i + size] for i in range(0, len(group), size))

    @cached_property
    def _rules(self) -> EncodingRules:
        return EncodingRules(self.processor, self.schema, self.max_length, self.limits, self.decoder_inputs)

    @cached_property
    def answers(self) -> AnswerWriter:
        """The writer of rows with answers."""
        return AnswerWriter(self.processor, self.schema)

    def causal(self, ids: list[int], labels: list[int], text: str = "") -> Iterator[Example]:
        """Yield the example for a language model, if it has something to learn.

        Raises `DataError` for a token that the model does not know.
        """
        self.limits.refuse(self.processor, ids, text, max_length=self.max_length)
        yield from causal(ids, labels)

    def _batched(self, key: str, tensors: Sequence[Tensor]) -> Tensor:
        if tensors[0].dim() != 1:
            _check_alike(tensors)
            return torch.stack(list(tensors))
        pad = getattr(self.processor, "pad_token_id", None) or 0
        padding = {
            "input_ids": pad,
            "decoder_input_ids": pad,
            "token_type_ids": getattr(self.processor, "pad_token_type_id", 0),
            "labels": IGNORED,
        }
        side = "left" if self.limits.pads_left else "right"
        return pad_sequence(list(tensors), batch_first=True, padding_value=padding.get(key, 0), padding_side=side)


def _by_length(ordered: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield the examples of each length."""
    yield from (list(group) for _, group in groupby(ordered, key=length))


def _check_alike(tensors: Sequence[Tensor]) -> None:
    """Raise `DataError` for images that the model's processor has left of unlike size."""
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise DataError(
            f"images of the shapes {shapes[0]} and {shapes[-1]} cannot stand in one batch: the model's image processor "
            "leaves sizes as they are; give images of one size, or set do_resize in its preprocessor_config.json"
        )


def _text(encoder: Encoder, rows: Rows) -> Iterator[EncodedRow]:
    """Yield the examples of every text: its consecutive blocks."""
    (first, _), last = around(encoder.processor), ending(encoder.processor)
    texts = [row[encoder.schema.columns[0]] for row in rows]
    for ids, text in zip(ids_of(encoder.processor, texts), texts, strict=True):
        whole = ended(opened(ids, first), last) if ids else []
        blocks = (encoder.causal(block, block, text) for block in _blocks(whole, encoder.max_length))
        yield EncodedRow(tuple(chain.from_iterable(blocks)), len(whole))


def _blocks(whole: list[int], size: int) -> Iterator[list[int]]:
    """Yield blocks of `size` tokens; the last one only if it is not too short."""
    for start in range(0, len(whole), size):
        block = whole[start : start + size]
        if start == 0 or len(block) >= SHORTEST:
            yield block


def _answered(encoder: Encoder, rows: Rows) -> Iterator[EncodedRow]:
    """Yield one example a row: all of it, or what there is room for, of which the answers are learned."""
    for row in rows:
        written = encoder.answers.write(row)
        kept = encoder.answers.kept(written, encoder.max_length)
        ids = [written.ids[i] for i in kept]
        labels = [written.ids[i] if written.learned[i] else IGNORED for i in kept]
        examples = encoder.causal(ids, labels, text=str(row[encoder.schema.columns[0]]))
        yield EncodedRow(tuple(examples), len(written.ids), written.unlearned_turns)


def _seq2seq(encoder: Encoder, rows: Rows) -> Iterator[EncodedRow]:
    """Yield one example a row for an encoder-decoder: its prompt, and its response."""
    assert encoder.decoder_inputs
    made = Seq2Seq(encoder.processor, encoder.max_length, encoder.decoder_inputs)
    said = [conversation(encoder.schema, row) for row in rows]
    for row in made([one.prompt for one in said], [one.answer for one in said]):
        for ids in (e[key].tolist() for e in row.examples for key in ("input_ids", "decoder_input_ids")):
            encoder.limits.refuse(encoder.processor, ids, max_length=encoder.max_length)
        yield row


def _label(encoder: Encoder, rows: Rows) -> Iterator[EncodedRow]:
    """Yield one example a row: a text, or a pair of texts, and its class."""
    *texts, _ = encoder.schema.columns
    columns = [[row[name] for row in rows] for name in texts]
    made = TextInputs(encoder.processor, encoder.limits, encoder.max_length)(columns)
    for text, row in zip(made, rows, strict=True):
        example = {**text.inputs, "labels": encoded_target(encoder.schema, row)}
        yield EncodedRow((example,), text.tokens)


def _image(encoder: Encoder, rows: Rows) -> Iterator[EncodedRow]:
    image, _ = encoder.schema.columns
    for row in rows:
        inputs = encode_image(encoder.processor, row[image], encoder.channels)
        yield EncodedRow((inputs | {"labels": encoded_target(encoder.schema, row)},))


KINDS: dict[str, Callable[[Encoder, Rows], Iterator[EncodedRow]]] = {  # of every row, its examples
    "text": _text,
    "response": _answered,
    "chat": _answered,
    "preference": preferences.encoded,
    "label": _label,
    "image": _image,
}
