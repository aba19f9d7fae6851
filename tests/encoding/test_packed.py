"""Packed rows are the rows again when they are unpacked, and take four bytes a token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.encoding.examples import IGNORED, EncodedRow, Example
from fedlora.encoding.lazy import Lazy, examples_of
from fedlora.encoding.packed import UnpackableError, in_memory, pack, unpack

NUMBERS = st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=40)


def plain(examples: Any) -> list[dict[str, Any]]:
    return [{key: (t.dtype, t.shape, t.tolist()) for key, t in example.items()} for example in examples]


@st.composite
def example(draw: st.DrawFn) -> Example:
    """An example of any kind: labels that are learned in part, or a class, or floats; types of tokens, or none."""
    ids = torch.tensor(draw(NUMBERS), dtype=torch.int64)
    learned = torch.tensor(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=torch.bool)
    labels = [torch.where(learned, ids, IGNORED), torch.tensor(3), torch.tensor([0.1, 1.0]), torch.tensor(-0.3)]
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": draw(st.sampled_from(labels))}
    decoded = torch.tensor(draw(NUMBERS), dtype=torch.int64)
    more = {"token_type_ids": learned.long(), "decoder_input_ids": decoded, "rejected_input_ids": decoded}
    more |= {"rejected_labels": decoded.clone(), "reference": torch.tensor([-3.5, 1e-8])}
    chosen = draw(st.sets(st.sampled_from([*more])))
    return dict(draw(st.permutations([*made.items(), *((key, more[key]) for key in chosen)])))


@settings(max_examples=15)
@given(st.lists(example(), max_size=3), st.integers(0, 2**31 - 1), st.integers(0, 9))
def test_a_row_is_itself_again(examples: list[Example], tokens: int, turns: int) -> None:
    row = unpack(pack(EncodedRow(examples, tokens, turns)))
    assert plain(row.examples) == plain(examples)
    assert (row.tokens, row.unlearned_turns) == (tokens, turns)


@settings(max_examples=10)
@given(st.lists(st.lists(example(), max_size=3), max_size=4))
def test_rows_lie_in_memory_one_after_another(rows: list[list[Example]]) -> None:
    packed = in_memory([pack(EncodedRow(examples)) for examples in rows])
    assert [plain(row.examples) for row in packed] == [*map(plain, rows)]
    every = examples_of(packed)
    assert plain(every) == plain(e for examples in rows for e in examples)
    assert plain(every[1::2]) == plain(every)[1::2] and plain(every[-1:]) == plain(every)[-1:]


def test_a_text_takes_four_bytes_a_token() -> None:
    ids = torch.arange(1000)
    labels = torch.where(ids < 500, IGNORED, ids)
    row = EncodedRow([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}])
    assert pack(row).nbytes < 4.2 * 1000


def test_unknown_tensors_are_refused() -> None:
    for odd in ({"shape_ids": torch.tensor([1])}, {"labels": torch.tensor([True])}, {"labels": torch.tensor(2**40)}):
        with pytest.raises(UnpackableError):
            pack(EncodedRow([odd]))


def test_a_lazy_sequence_makes_what_is_asked_for() -> None:
    made: list[int] = []
    squares = Lazy(5, lambda i: made.append(i) or i * i)
    assert [squares[-1], squares[1:4][1]] == [16, 4] and made == [4, 2]
    assert [*squares] == [0, 1, 4, 9, 16]
