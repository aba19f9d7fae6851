"""Preference data as examples: a prompt with a chosen and a rejected answer, both written as a conversation is.

An example holds the chosen answer under the usual names and the rejected one under the same names after `rejected_`; in
a batch of n examples the first n rows are the chosen ones, and the others, in the same order, the rejected ones.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Protocol

from fedlora.data.conversations import Conversation, preference
from fedlora.data.rows import Rows
from fedlora.data.schema import Schema

from .answers import AnswerWriter, start_of_last
from .chat import WrittenChat
from .examples import IGNORED, EncodedRow, Example

ROW = ("input_ids", "attention_mask", "labels")  # of an example, what either answer has
OTHER = "rejected_"  # before these names, of the answer that was not preferred
REFERENCE = "reference"  # (2,): what the base alone says of the chosen answer and of the rejected one


class Writer(Protocol):
    """The part of an `Encoder` that writes preferences."""

    @property
    def schema(self) -> Schema: ...
    @property
    def max_length(self) -> int: ...
    @property
    def answers(self) -> AnswerWriter: ...
    def causal(self, ids: list[int], labels: list[int], text: str = "") -> Iterator[Example]: ...


def encoded(encoder: Writer, rows: Rows) -> Iterator[EncodedRow]:
    """Yield one example a row, without its reference; none of a row whose answers are alike, or do not fit."""
    for row in rows:
        pair = preference(encoder.schema, row)
        yield _encoded(encoder, (pair.chosen, pair.rejected))


def _encoded(encoder: Writer, pair: tuple[Conversation, Conversation]) -> EncodedRow:
    if not all(conversation.learned for conversation in pair):
        return EncodedRow(())
    written = [encoder.answers.write_conversation(conversation) for conversation in pair]
    tokens = max(len(w.ids) for w in written)
    sizes = _sizes(written, encoder.max_length)
    found = [_example(encoder, w, size) for w, size in zip(written, sizes, strict=True)]
    if not all(found):
        return EncodedRow((), tokens)
    chosen, rejected = chain.from_iterable(found)
    return EncodedRow((chosen | {f"{OTHER}{key}": rejected[key] for key in ROW},), tokens)


def _sizes(pair: Sequence[WrittenChat], size: int) -> list[int]:
    """How many tokens of each answer's row there is room for, so that both keep the same end of the prompt."""
    answers = [len(w.ids) - start_of_last(w.learned) for w in pair]
    longest = min(max(answers), size)
    return [size - longest + min(answer, longest) for answer in answers]


def _example(encoder: Writer, written: WrittenChat, size: int) -> list[Example]:
    """What there is room for, of which the answer is learned; nothing without a token of it."""
    kept = encoder.answers.kept(written, size)
    ids = [written.ids[i] for i in kept]
    return list(encoder.causal(ids, [written.ids[i] if written.learned[i] else IGNORED for i in kept]))


def as_rows(examples: Sequence[Example]) -> list[Example]:
    """The rows of a batch: the chosen answers, and after all of them the rejected ones."""
    chosen = [_row(example, "", 0) for example in examples]
    return chosen + [_row(example, OTHER, 1) for example in examples]


def _row(example: Example, prefix: str, place: int) -> Example:
    row = {key: example[prefix + key] for key in ROW}
    return row | {REFERENCE: example[REFERENCE][place]} if REFERENCE in example else row
