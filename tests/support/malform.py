"""Uploads that are wrong in one way each: a valid one of every kind, and what a liar or a broken line makes of it."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto  # type: ignore[attr-defined]

from fedlora.messages.parts import content_hash
from fedlora.tensors import from_bytes, to_bytes

INF, NAN = float("inf"), float("nan")
NOT_TEXT: list[Any] = [1, 1.5, True, None, [], {}, ["x"], [[[]]]]
NOT_WHOLE: list[Any] = [1.5, 17.5, "17", "", True, None, [], {}, [1], NAN, INF, -INF, 10**5000]
NO_COUNT: list[Any] = [*NOT_WHOLE, -1, -(2**63), 10**13, 2**64, 10**100, 10**4300 - 1]
NOT_FLOAT: list[Any] = ["x", "0.5", True, [], {}, [0.5], NAN]
PICKLED = Path(gettempdir()) / f"fedlora-unpickled-{os.getpid()}"
SIZES = (0, 1, 2, 7, 100)


@dataclass(frozen=True)
class Kind:
    """A valid upload, how the server reads it, and values that the fields of its head cannot have."""

    records: RecordDict
    read: Callable[[RecordDict], Any]
    same: Callable[[Any], bool]  # is what was read the valid one, but for what a client may say of itself?
    wrong: Mapping[tuple[str, ...], Sequence[Any]]
    optional: tuple[str, ...] = ()  # fields that may be missing

    @property
    def head(self) -> dict[str, Any]:
        head: dict[str, Any] = json.loads(str(self.records.config_records["head"]["json"]))
        return head

    @property
    def array(self) -> Array:
        return self.records.array_records["array"]["numbers"]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return from_bytes(self.array.data)

    @property
    def ways(self) -> list["Way"]:
        """What can be done to it, each so that it must be refused."""
        arrays = ARRAYS if "array" in self.records else [unasked]
        return [*HEADS, *HEADS, *RECORDS, *arrays, *arrays, *(SEALED if "name" in self.head else [])]

    def with_head(self, head: Any) -> RecordDict:
        """Itself with another head: JSON, or what is to be it."""
        said = head if isinstance(head, str) else json.dumps(head)
        return RecordDict({**dict(self.records.items()), "head": ConfigRecord({"json": said})})

    def with_array(self, array: Array) -> RecordDict:
        return RecordDict({**dict(self.records.items()), "array": ArrayRecord({"numbers": array})})

    def with_bytes(self, content: bytes) -> RecordDict:
        """Itself with other bytes, in an array that says nothing false of itself."""
        return self.with_array(Array("uint8", (len(content),), "safetensors", content))

    def sealed(self, content: bytes) -> RecordDict:
        """Itself with other bytes, and the hash that goes with them: a liar can do that."""
        head = {**self.head, "name": content_hash(content)}
        return replace(self, records=self.with_bytes(content)).with_head(head)


Way = Callable[[Kind, Random], RecordDict]


def wrong_value(kind: Kind, random: Random) -> RecordDict:
    head, place = kind.head, random.choice(list(kind.wrong))
    inner = head
    for key in place[:-1]:
        inner = inner[key]
    value = random.choice(kind.wrong[place])
    text = json.dumps(value) if value != 10**5000 else "9" * 5000  # more digits than Python writes
    inner[place[-1]] = "@@"
    return kind.with_head(json.dumps(head).replace('"@@"', text))


def missing_field(kind: Kind, random: Random) -> RecordDict:
    head = kind.head
    del head[random.choice([k for k in head if k not in kind.optional])]
    return kind.with_head(head)


def extra_field(kind: Kind, random: Random) -> RecordDict:
    keys = {f"{word(random)}+": random.choice(NO_COUNT[:8]) for _ in range(random.choice((1, 1, 1, 3, 300)))}
    return kind.with_head({**kind.head, **keys} if random.random() < 0.5 else {**keys, **kind.head})


def no_json(kind: Kind, random: Random) -> RecordDict:
    text = json.dumps(kind.head)
    deep = random.choice(["[", '{"a":', "[[],"]) * random.choice((10, 300, 10_000))
    cut = text[: random.randrange(len(text))]
    return kind.with_head(random.choice([cut, deep, "", "null", "[]", "3", text + "x", word(random), "\0" + text]))


def large_head(kind: Kind, random: Random) -> RecordDict:
    if random.random() < 0.95:  # the others take long to make
        return kind.with_head({**kind.head, "x": "y" * random.choice((1, 10_000))})
    n = random.choice((2 * 10**6, 10**7))
    return kind.with_head(random.choice([" " * n, '{"x":"' + "y" * n + '"}', '{"lacks":[' + "1," * n, "[" * n]))


def no_text(kind: Kind, random: Random) -> RecordDict:
    text = json.dumps(kind.head)
    value = random.choice([text.encode(), 3, 1.5, True, [text], [], [b""], b"\xff"])
    return RecordDict({**dict(kind.records.items()), "head": ConfigRecord({"json": value})})


def lying_header(kind: Kind, random: Random) -> RecordDict:
    """Hash and all, so that the header of the numbers itself must be looked at."""
    header, body = parted(kind.array.data)
    name = random.choice(list(header))
    entry = header[name]
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    n = int(np.prod(shape))
    shapes: list[Any] = [
        *([*shape[::-1], 1], [n, 1, 1], [-d for d in shape], [n + 1], [2**32, 2**32, *shape], [0, 2**39, 2**39]),
        *([2**39, 2**39, 0], [2**63], [2**64], [10**4000], [float(d) for d in shape], [str(d) for d in shape]),
        *([[d] for d in shape], [NAN], [None], [True] * 9, n, None, "x", {}, [1] * 60 + [n], [n] * 3, []),
    ]
    types: list[Any] = [
        *["F33", "F4", "BOOL", "U8", "I16", "U32", "C64", "F8_E4M3", "f32", "float32"],
        "",
        7,
        None,
        ["F32"],
    ]
    offsets: list[Any] = [
        *([begin, end + 1], [begin + 1, end], [begin + 1, end + 1], [end, begin], [begin, 2**64], [-1, end]),
        *([begin, float(end)], [begin, str(end)], [begin], [begin, end, end], [], None, "x", end, [2**63, 2**63 + end]),
    ]
    lies: list[Any] = [
        *({**entry, "shape": lie} for lie in random.sample(shapes, 4)),
        *({**entry, "dtype": random.choice(types)}, {**entry, "data_offsets": random.choice(offsets)}),
        *(without(entry, random.choice(list(entry))), None, 3, [], "x", [entry]),
    ]
    changed = {**header, name: random.choice(lies)}
    return kind.sealed(joined(random.choice([changed, changed, changed, names(header, name, random)]), body))


def names(header: dict[str, Any], name: str, random: Random) -> dict[str, Any]:
    """The header with a tensor called otherwise, missing, there twice in the bytes, or with more of them."""
    rest = without(header, name)
    module, entry = name.rpartition(" ")[2], header[name]
    sides = (f"{side} {module}" for side in ("AB", "X", "a", ""))
    other = random.choice([f"{name}+", module + "+", "", " ", *sides])
    end = max(e["data_offsets"][1] for e in header.values())
    many = 10**5 if random.random() < 0.01 else random.choice((1, 10, 500))
    empty = {"dtype": entry["dtype"], "shape": [0], "data_offsets": [end, end]}
    wrong: list[dict[str, Any]] = [
        *(rest, {}, {**rest, other: entry}, {**rest, word(random) + "+": entry}, {**header, f"{name}+": entry}),
        {**header, **{f"A {j}+": empty for j in range(many)}},
        {**rest, "__metadata__": entry},
        {**header, "__metadata__": random.choice([3, "x", [], {"x": 1}, {"x": None}, {"x": {}}])},
    ]
    return random.choice(wrong)


def without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k != name}


def no_header(kind: Kind, random: Random) -> RecordDict:
    """Hash and all: where the header should be there is none, or one that cannot be read, or is not that long."""
    header, body = parted(kind.array.data)
    text = json.dumps(header)
    deep = random.choice(["[", '{"a":', "[[],"]) * random.choice((10, 300, 10_000))
    cut = text[: random.randrange(len(text))]
    texts = [cut, deep, "", "null", "[]", "3", text + "x", word(random) + "x", "\0" + text]
    n = random.choice([0, 1, 7, len(text) - 1, len(text) + 1, 2**31, 2**40, 2**62, 2**63, 2**64 - 9, 2**64 - 1])
    whole = kind.array.data
    wrong = [
        *(joined(random.choice(texts), body), joined(random.choice(texts), body), joined(header, body, n)),
        *(joined(b"\xff" + text.encode(), body), joined(header, body[:-1]), joined(header, body + b"\0")),
        *(whole[: random.randrange(len(whole))], whole[1:], whole + whole, random.randbytes(random.choice(SIZES))),
        joined(text + " " * random.choice((10**5, 10**6)), body),
    ]
    return kind.sealed(random.choice(wrong))


def retyped(tensors: Mapping[str, torch.Tensor], random: Random, types: Sequence[torch.dtype]) -> bytes:
    """The tensors in one of these types that none of them has."""
    to = random.choice([t for t in types if all(x.dtype != t for x in tensors.values())])
    return to_bytes({name: t.to(to) for name, t in tensors.items()})


def other_type(kind: Kind, random: Random) -> RecordDict:
    more = torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool, torch.bfloat16
    return kind.with_bytes(retyped(kind.tensors, random, more))


def other_shape(kind: Kind, random: Random) -> RecordDict:
    tensors = kind.tensors
    name = random.choice(list(tensors))
    t = tensors[name]
    n = random.randrange(len(t))
    shapes = [t[None], t[..., None], t[:n], torch.cat([t, t[: n + 1]]), t[n], t.reshape(1, -1, 1)]
    return kind.with_bytes(to_bytes({**tensors, name: random.choice(shapes)}))


def other_fields(kind: Kind, random: Random) -> RecordDict:
    a = kind.array
    shape = random.choice([(), (1,), (0,), (-1,), (*a.shape, 1), (a.shape[0] + 1,), (2**62, 2**62)])
    dtype = random.choice(["", "object", "float", "int8", word(random)])
    stype = random.choice(["", "pickle", "torch", "npy", "numpy.ndarray"])
    told = [(dtype, a.shape, a.stype), (a.dtype, shape, a.stype), (a.dtype, a.shape, stype)]
    return kind.with_array(Array(*random.choice(told), a.data))


def other_bytes(kind: Kind, random: Random) -> RecordDict:
    """Bytes that are no safetensors file, or more than one."""
    data, rest = kind.array.data, random.randbytes(random.choice(SIZES[1:]))
    many = [data[: random.randrange(len(data))], data + rest, rest, rest + data, data * 2, zipped(random), npy(rest)]
    return kind.with_bytes(random.choice(many))


def pickled(kind: Kind, random: Random) -> RecordDict:
    """An array of objects; who unpickles it makes a file."""
    code = b"cbuiltins\nopen\n(S'" + str(PICKLED).encode() + b"'\nS'w'\ntR."
    data = random.choice([code, npy(code, "|O"), npy(code, "<f4")])
    stype = random.choice(["numpy.ndarray", "pickle", "safetensors"])
    return kind.with_array(Array("uint8", (len(data),), stype, data))


def changed_number(kind: Kind, random: Random) -> RecordDict:
    """Another number, and the hash as it was; where there is no hash, one that cannot be counted."""
    tensors = kind.tensors
    numbers = tensors[random.choice(list(tensors))].view(-1)
    i = random.randrange(len(numbers))
    numbers[i] = numbers[i] + 1 if "name" in kind.head else -1
    return kind.with_bytes(to_bytes(tensors))


def no_number(kind: Kind, random: Random) -> RecordDict:
    """One that is not finite, or too large, and the hash that goes with it; of masked numbers another count."""
    tensors, value = kind.tensors, random.choice([NAN, INF, -INF, 1e9, -1e9, 1e30])
    if "masked" in tensors:
        return kind.sealed(to_bytes({"masked": tensors["masked"][: random.randrange(len(tensors["masked"]))]}))
    numbers = random.choice([t for t in tensors.values() if t.is_floating_point()]).view(-1)  # of int8, the scales
    numbers[random.randrange(len(numbers))] = value
    return kind.sealed(to_bytes(tensors))


def as_another_type(kind: Kind, random: Random) -> RecordDict:
    """Numbers of a type that was not asked for, and the hash that goes with them."""
    return kind.sealed(retyped(kind.tensors, random, (torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool)))


def unasked(kind: Kind, random: Random) -> RecordDict:
    dtype = random.choice([torch.float32, torch.int64, torch.int8])
    numbers = torch.zeros(random.choice(SIZES), dtype=dtype)
    return kind.with_bytes(to_bytes({random.choice(["A q", "confusion"]): numbers}))


def more_records(kind: Kind, random: Random) -> RecordDict:
    name = random.choice(["x", "", "Head", "array2", word(random) + "+", "n" * 10**5])
    more: list[Any] = [
        MetricRecord({"a": 1, "b": [1.5, 2.5]}),
        ConfigRecord({"json": json.dumps(kind.head)}),
        ConfigRecord({"x": "y" * random.choice((1, 10, 10**6))}),
        ArrayRecord({"vector": Array(np.zeros(3))}),
        ArrayRecord(),
    ]
    return RecordDict({**dict(kind.records.items()), name: random.choice(more)})


def other_records(kind: Kind, random: Random) -> RecordDict:
    head = kind.records["head"]
    two = ArrayRecord({"vector": Array(np.zeros(3)), "w": Array(np.zeros(3))})
    kinds: list[dict[str, Any]] = [
        *({}, {"x": head}, {"head": MetricRecord({"json": 1})}, {"head": ConfigRecord()}, {"head": ArrayRecord()}),
        *({"head": head, "array": two}, {"head": head, "array": ConfigRecord({"x": 1})}, {"array": two}),
        *({"head": head, "array": MetricRecord()}, {"head": ConfigRecord({"json": str(head["json"]), "x": 1})}),
        {"head": ConfigRecord({word(random) + "+": str(head["json"])})},
    ]
    return RecordDict(random.choice(kinds))


HEADS: list[Way] = [wrong_value, wrong_value, missing_field, extra_field, no_json, large_head, no_text]
RECORDS: list[Way] = [more_records, other_records]
ARRAYS: list[Way] = [other_type, other_shape, other_fields, other_bytes, pickled, changed_number]
SEALED: list[Way] = [lying_header, lying_header, lying_header, no_header, no_number, as_another_type]


def over_the_wire(kind: Kind, other: Kind, random: Random) -> RecordDict:
    """What Flower makes of the message's bytes, after bits have flipped or pieces been cut, put in or put elsewhere.

    Raises whatever Flower does where it makes nothing of them.
    """
    data = bytearray(recorddict_to_proto(kind.records).SerializeToString())
    at, n = random.randrange(len(data)), random.choice((1, 1, 2, 8, 64))
    what = random.randrange(6)
    if what < 3:
        for _ in range(what + 1):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif what == 3:
        del data[at : at + n]
    else:
        donor = recorddict_to_proto(other.records).SerializeToString() if what == 4 else random.randbytes(100)
        start = random.randrange(len(donor))
        data[at : at + random.choice((0, n))] = donor[start : start + n]
    return recorddict_from_proto(Proto.FromString(bytes(data)))


def word(random: Random) -> str:
    return "".join(random.choices("ab\n\x1b\u202eé字🙂\\\"'{[ ", k=random.choice(SIZES)))


def parted(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of bytes in the safetensors format, and what follows it."""
    end = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:end])
    return header, content[end:]


def joined(header: Any, body: bytes, size: int | None = None) -> bytes:
    """Bytes in the safetensors format with this header, which says that it is of this size."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode(errors="replace") if isinstance(text, str) else text
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + body


def npy(body: bytes, dtype: str = "<f4") -> bytes:
    """A file in numpy's format, which nobody reads here."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (1,), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def zipped(random: Random) -> bytes:
    """Arrays in a zip file, of a hundred times its size."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(random.choice(["vector.npy", "arr_0.npy", "../x"]), bytes(random.choice((10, 10**4, 10**5))))
    return out.getvalue()
