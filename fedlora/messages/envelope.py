"""A message as Flower carries it: a head of plain values as JSON, and at most one array. Nothing is pickled."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fedlora.errors import WireError

CARRIED = {torch.bfloat16: torch.int16}  # numpy has no bfloat16: its bits travel
VECTOR = re.compile(  # numpy's format of a vector, as it writes it
    rb"\x93NUMPY\x01\x00(?P<length>..)\{'descr': '(?P<type><[fi][248]|\|i1)', 'fortran_order': False, "
    rb"'shape': \((?P<n>\d{1,15}),\), \} *\n",
    re.DOTALL,
)
MOST_WORDS = 500  # characters of a refusal: what came may stand in it
MOST_ERRORS = 100  # that are looked into: pydantic has no way to ask for the first alone
T = TypeVar("T")


def pack(head: Any, array: ArrayRecord | None = None) -> RecordDict:
    """A message."""
    records = RecordDict({"head": ConfigRecord({"json": TypeAdapter(type(head)).dump_json(head).decode()})})
    if array is not None:
        records["array"] = array
    return records


def read_head(records: RecordDict, kind: type[T]) -> T:
    """A message's head, checked. Raises `WireError` where it is of another kind."""
    try:
        return TypeAdapter(kind).validate_json(text(records), strict=True)
    except ValidationError as e:
        if e.error_count() > MOST_ERRORS:
            raise WireError(f"a message is no {kind.__name__}: {e.error_count()} things are wrong in it") from None
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"])) or "head"
        raise WireError(printable(f"a message is no {kind.__name__}: {place}: {first['msg']}")) from e


def text(records: RecordDict) -> str:
    """A message's head as it came. Raises `WireError` where there is none."""
    head = records.config_records.get("head")
    found = head.get("json") if head is not None else None
    if not isinstance(found, str):
        raise WireError(printable(f"a message has no head; it has {', '.join(records) or 'nothing'}"))
    return found


def as_array(vector: Tensor) -> ArrayRecord:
    """A vector, as a message carries it."""
    bits = vector.view(CARRIED.get(vector.dtype, vector.dtype))
    return ArrayRecord({"vector": Array(bits.numpy())})  # in numpy's own format


def read_vector(records: RecordDict, dtype: str) -> Tensor:
    """The one array of a message in the type its head names; of no length where there is none."""
    arrays = [a for record in records.array_records.values() for a in record.values()]
    kind: torch.dtype = getattr(torch, dtype)
    if not arrays:
        return torch.empty(0, dtype=kind)
    if len(arrays) > 1:
        raise WireError(f"a message has {len(arrays)} arrays; it may have one")
    bits = _numbers(arrays[0])
    if bits.dtype != CARRIED.get(kind, kind):
        raise WireError(f"an array is {bits.dtype} of shape {tuple(bits.shape)}; its head says a vector of {dtype}")
    return bits.view(kind) if len(bits) else torch.empty(0, dtype=kind)  # numpy's empty vector has no stride


def _numbers(array: Array) -> Tensor:
    """The vector that an array's bytes are. Raises `WireError` where they are anything else.

    numpy's own reader has Python evaluate the header: deep ones upset its parser, in Python 3.11 for other threads too
    (https://github.com/python/cpython/issues/106905), so that an honest upload beside them could be refused.
    """
    found = VECTOR.match(array.data)
    if array.stype != "numpy.ndarray" or not found or found.end() != 10 + int.from_bytes(found["length"], "little"):
        raise WireError("an array could not be read: it is no vector of numbers in numpy's format")
    kind, n = np.dtype(found["type"].decode()), int(found["n"])
    told, here = (array.dtype, tuple(array.shape), len(array.data) - found.end()), (kind.name, (n,), n * kind.itemsize)
    if told != here:
        said, are = ("{} of shape {} in {} bytes".format(*what) for what in (told, here))
        raise WireError(printable(f"an array says it is {said}; its numbers are {are}"))
    return torch.from_numpy(np.frombuffer(array.data, kind, n, found.end()).copy())


def dtype_name(vector: Tensor) -> Any:
    """The type of a vector, as a head names it."""
    return str(vector.dtype).removeprefix("torch.")


def printable(words: str, also: str = "") -> str:
    """Words in which something that came may stand, so that they fit a line of a log: printable, and not too long.

    `also`: characters that may stay.
    """
    kept = words if len(words) <= MOST_WORDS else words[:MOST_WORDS] + "..."
    return "".join(c if c.isprintable() or c in also else "?" for c in kept)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever the libraries say of bytes that are not what they should be, as one sentence."""
    try:
        yield
    except WireError as e:
        raise WireError(printable(str(e))) from e
    except Exception as e:
        raise WireError(printable(f"{what} could not be read: {type(e).__name__}: {e}")) from e
