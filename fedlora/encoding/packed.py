"""Encoded rows as vectors of int32, which lie one after another in memory or in a file, and are unpacked when read.

A row as tensors of int64 takes hundreds of bytes a token; packed, a text takes four, since what follows from its tokens
is not stored: a mask of ones, and labels that are the tokens themselves or are ignored. The vector of a row is

    tokens, unlearned turns, count of examples, size of each example's vector, the examples' vectors

and that of an example holds its tensors one after another, each as a code, its shape where that is not its tokens', and
its numbers where they do not follow from the tokens.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .examples import IGNORED, EncodedRow, Example
from .lazy import Lazy

Ints = NDArray[np.int32]
Ints64 = NDArray[np.int64]
HEADER = 3  # numbers of a row's vector before the sizes of its examples
TOKENS = "input_ids"
KEYS = (  # of an example; a key's place is written, so a new one goes to the end
    TOKENS,
    "attention_mask",
    "labels",
    "token_type_ids",
    "decoder_input_ids",
    "rejected_input_ids",
    "rejected_attention_mask",
    "rejected_labels",
    "position_ids",
    "reference",
)
VALUES, FLOATS, ONES, ZEROS, SAME, LEARNED = range(6)  # forms of a tensor; from ONES on shaped like the tokens


class UnpackableError(ValueError):
    """An example has a tensor that these vectors have no form for."""


class Numbers(Protocol):
    """Where vectors lie: an array, or a file of which more is mapped as it grows."""

    def __getitem__(self, where: slice, /) -> Ints: ...


def pack(row: EncodedRow) -> Ints:
    """The vector of a row. Raises `UnpackableError` for a tensor with an unknown key, or of an unknown type."""
    vectors = [_packed(example) for example in row.examples]
    head = [row.tokens, row.unlearned_turns, len(vectors), *map(len, vectors)]
    return np.concatenate([np.array(head, np.int32), *vectors])


def unpack(vector: Ints) -> EncodedRow:
    """The row of a vector; its examples are made anew each time they are asked for."""
    tokens, unlearned_turns, count = vector[:HEADER].tolist()
    ends = [*accumulate(vector[HEADER : HEADER + count].tolist(), initial=HEADER + count)]
    examples = Lazy(count, lambda i: _unpacked(vector[ends[i] : ends[i + 1]]))
    return EncodedRow(examples, tokens=tokens, unlearned_turns=unlearned_turns)


def unpacked_rows(numbers: Numbers, starts: Ints64, sizes: Ints64) -> Sequence[EncodedRow]:
    """The rows whose vectors lie at these places among the numbers, each unpacked when it is asked for."""

    def row(i: int) -> EncodedRow:
        start = int(starts[i])
        return unpack(numbers[start : start + int(sizes[i])])

    return Lazy(len(starts), row)


def in_memory(vectors: Sequence[Ints]) -> Sequence[EncodedRow]:
    """The rows of vectors, which are joined to one."""
    sizes = np.array([len(vector) for vector in vectors], np.int64)
    numbers = np.concatenate([np.zeros(0, np.int32), *vectors])
    return unpacked_rows(numbers, np.cumsum(sizes) - sizes, sizes)


def _packed(example: Example) -> Ints:
    """The vector of an example."""
    numbers = {key: _numbers(key, tensor) for key, tensor in example.items()}
    ordered = sorted(numbers, key=lambda key: key != _tokens_of(key))  # tokens before what follows from them
    parts = (_packed_tensor(key, numbers[key], numbers.get(_tokens_of(key))) for key in ordered)
    return np.concatenate([*chain.from_iterable(parts)])


def _numbers(key: str, tensor: Tensor) -> Any:
    """The numbers of a tensor that there is a form for."""
    if key not in KEYS or tensor.dtype not in (torch.int64, torch.float32):
        raise UnpackableError(f"{key}, of {tensor.dtype}")
    return tensor.detach().numpy()


def _packed_tensor(key: str, numbers: Any, tokens: Any) -> tuple[Ints, Ints]:
    """The code of a tensor and its shape, and its numbers; of one that follows from the tokens less."""
    form = FLOATS if numbers.dtype == np.float32 else _form(numbers, tokens)
    code = KEYS.index(key) << 16 | form << 8 | numbers.ndim
    return np.array([code, *(numbers.shape if form <= FLOATS else ())], np.int32), _data(form, numbers)


def _tokens_of(key: str) -> str:
    """The key of the tokens that a tensor goes with."""
    return f"rejected_{TOKENS}" if key.startswith("rejected_") else TOKENS


def _form(numbers: Any, tokens: Any) -> int:
    """How whole numbers follow from their tokens; VALUES where they do not."""
    if tokens is None or tokens is numbers or tokens.shape != numbers.shape:
        return VALUES
    follows: dict[int, Callable[[], Any]] = {
        ONES: lambda: numbers == 1,
        ZEROS: lambda: numbers == 0,
        SAME: lambda: numbers == tokens,
        LEARNED: lambda: (numbers == tokens) | (numbers == IGNORED),
    }
    return next((form for form, holds in follows.items() if holds().all()), VALUES)


def _data(form: int, numbers: Any) -> Ints:
    """The numbers that are stored of a tensor in this form."""
    flat = numbers.reshape(-1)
    if form == FLOATS:
        return np.ascontiguousarray(flat).view(np.int32)
    if form == LEARNED:
        bits = np.packbits(flat != IGNORED)
        return np.pad(bits, (0, -len(bits) % 4)).view(np.int32)
    if form != VALUES:
        return np.zeros(0, np.int32)
    whole: Ints = flat.astype(np.int32)
    if not np.array_equal(whole, flat):
        raise UnpackableError("a number beyond 32 bits")
    return whole


def _unpacked(vector: Ints) -> Example:
    """The example of a vector."""
    example: Example = {}
    at = 0
    while at < len(vector):
        code, at = int(vector[at]), at + 1
        key, form, dim = KEYS[code >> 16], code >> 8 & 0xFF, code & 0xFF
        if form <= FLOATS:
            shape, at = vector[at : at + dim].tolist(), at + dim
            size = prod(shape)
            example[key], at = _read(form, vector[at : at + size], shape), at + size
        else:
            tokens = example[_tokens_of(key)]
            size = -(-len(tokens) // 32) if form == LEARNED else 0
            example[key], at = _derived(form, vector[at : at + size], tokens), at + size
    return example


def _read(form: int, data: Ints, shape: Sequence[int]) -> Tensor:
    """A tensor of its own numbers; they are copied, as the file may be read-only."""
    numbers: Any = data.astype(np.int64) if form == VALUES else data.copy().view(np.float32)
    return torch.from_numpy(numbers.reshape(shape))


def _derived(form: int, data: Ints, tokens: Tensor) -> Tensor:
    """A tensor that follows from its tokens, (tokens,)."""
    if form == LEARNED:
        learned = np.unpackbits(np.ascontiguousarray(data).view(np.uint8), count=len(tokens))
        return torch.where(torch.from_numpy(learned.astype(bool)), tokens, IGNORED)
    return {ONES: torch.ones_like, ZEROS: torch.zeros_like, SAME: torch.clone}[form](tokens)
