"""Messages as Flower carries them: a head of plain values as JSON, and at most one array of bytes. No pickle."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, TypeAdapter, ValidationError

from fedlora.errors import ConfigError, WireError

FORM = "safetensors"  # of an array's bytes
RUN = "[a-z0-9-]{0,40}"
RECORDS = {"head", "array"}
KEYS = {"json", "run"}  # of the record that is the head
MOST_WORDS = 500  # characters of a refusal: what came may stand in it
MOST_ERRORS = 100  # that are looked into: pydantic has no way to ask for the first alone
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class RawMessage:
    """A message taken apart: its text and its bytes, of which nothing is parsed yet."""

    head: str  # JSON
    run: str  # name of the run that it belongs to; empty where it says none
    numbers: bytes | None  # in the safetensors format (see `tensors`); None where there is no array


def pack(head: Any, array: ArrayRecord | None = None) -> RecordDict:
    """The message with this head and, where it has numbers, their array."""
    records = RecordDict({"head": ConfigRecord({"json": to_json(head).decode()})})
    if array is not None:
        records["array"] = array
    return records


def to_json(head: Any) -> bytes:
    """The head of a message as JSON, with its fields in their order."""
    kind: Any = type(head)
    return _adapter(kind).dump_json(head)


def from_json(text: bytes, kind: type[T]) -> T:
    """The value of this type that `to_json` wrote. Raises `WireError` for anything else."""
    try:
        value: T = TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as e:
        raise WireError(printable(f"no {kind.__name__}: {e.errors()[0]['msg']}")) from e
    return value


def build(kind: type[T], *values: object, **named: object) -> T:
    """The head of this type with these values. Raises `WireError` for a value that may not travel."""
    try:
        return kind(*values, **named)
    except ValidationError as e:
        raise WireError(_first(e, kind.__name__)) from e


def as_array(content: bytes) -> ArrayRecord:
    """The array in which a message carries bytes in the safetensors format."""
    return ArrayRecord({"numbers": Array("uint8", (len(content),), FORM, content)})


def stamp(records: RecordDict, run: str) -> RecordDict:
    """Mark a message with the name of its run, by which a client keeps its state; return the message."""
    records.config_records["head"]["run"] = run
    return records


def unpack(records: RecordDict) -> RawMessage:
    """The message's head, run and numbers. Raises `WireError` where there is no head, or more than a message has."""
    head = records.config_records.get("head")
    text = head.get("json") if head is not None else None
    if head is None or not isinstance(text, str):
        raise WireError(printable(f"a message has no head; it has {', '.join(records) or 'nothing'}"))
    if more := sorted([*({*records} - RECORDS), *({*head} - KEYS)]):
        raise WireError(printable(f"a message has more than was asked for: {', '.join(more)}"))
    return RawMessage(text, _run(head), _numbers(records))


def read_head(message: RawMessage, kind: type[T]) -> T:
    """The message's head as a value of this type. Raises `WireError` where it is of another kind."""
    head: T = _validated(message, kind, kind.__name__)
    return head


def read_either(message: RawMessage, kind: type[T], other: type[U]) -> T | U:
    """The message's head as a value of one of two types, which their field `kind` tells apart. Raises `WireError`."""
    head: T | U = _validated(message, Annotated[kind | other, Field(discriminator="kind")], kind.__name__)
    return head


def printable(words: str, also: str = "") -> str:
    """The words of a refusal, which may quote what came, fit for a line of a log: printable and not too long.

    `also` names characters that stay though they are not printable.
    """
    kept = words if len(words) <= MOST_WORDS else words[:MOST_WORDS] + "..."
    return "".join(c if c.isprintable() or c in also else "?" for c in kept)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises about malformed bytes into a `WireError` of one sentence."""
    try:
        yield
    except WireError as e:
        raise WireError(printable(str(e))) from e
    except Exception as e:
        raise WireError(printable(f"{what} could not be read: {type(e).__name__}: {e}")) from e


def _validated(message: RawMessage, kind: Any, name: str) -> Any:
    try:
        return _adapter(kind).validate_json(message.head, strict=True)
    except ValidationError as e:
        raise WireError(_first(e, name)) from e
    except ConfigError as e:  # of settings that contradict themselves
        raise WireError(printable(f"a message is no {name}: {e}")) from e


def _first(error: ValidationError, name: str) -> str:
    """What is wrong with a head, in words: the first thing, or how many."""
    if error.error_count() > MOST_ERRORS:
        return f"a message is no {name}: {error.error_count()} things are wrong in it"
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "head"
    return printable(f"a message is no {name}: {place}: {first['msg']}")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _run(head: ConfigRecord) -> str:
    """The run that the message says it belongs to. Raises `WireError` for what cannot be a folder's name."""
    run = head.get("run", "")
    if not isinstance(run, str) or not re.fullmatch(RUN, run):
        said = repr(run[:40]) if isinstance(run, str) else f"a {type(run).__name__}"
        raise WireError(f"a message is of run {said}; a run's name has up to 40 of a-z, 0-9 and -")
    return run


def _numbers(records: RecordDict) -> bytes | None:
    """The bytes of the message's one array. Raises `WireError` for an array that says it is something else."""
    if "array" not in records:
        return None
    arrays = list(records.array_records.get("array", ArrayRecord()).values())
    if len(arrays) != 1:
        raise WireError(f"a message has {len(arrays)} arrays; it may have one")
    array = arrays[0]
    n = len(array.data)
    if (array.dtype, tuple(array.shape), array.stype) != ("uint8", (n,), FORM):
        raise WireError(
            printable(
                f"an array says it is {array.dtype} of shape {tuple(array.shape)} in the form {array.stype!r}; "
                f"{n} bytes came, and numbers travel as uint8 of shape ({n},) in the form {FORM!r}"
            )
        )
    return bytes(array.data)
