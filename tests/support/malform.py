"""Uploads that are wrong in one way each: a valid one of every kind, and what a liar or a broken line makes of it."""

import io
import json
import os
import struct
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

from fedlora.vectors import content_hash

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
    def vector(self) -> np.ndarray:
        return self.records.array_records["array"]["vector"].numpy()

    @property
    def ways(self) -> list["Way"]:
        """What can be done to it, each so that it must be refused."""
        arrays = ARRAYS if "array" in self.records else [unasked]
        return [*HEADS, *HEADS, *RECORDS, *arrays, *arrays, *(SEALED if "manifest" in self.head else [])]

    def with_head(self, head: Any) -> RecordDict:
        """Itself with another head: JSON, or what is to be it."""
        said = head if isinstance(head, str) else json.dumps(head)
        return RecordDict({**dict(self.records.items()), "head": ConfigRecord({"json": said})})

    def with_array(self, array: Array) -> RecordDict:
        return RecordDict({**dict(self.records.items()), "array": ArrayRecord({"vector": array})})

    def sealed(self, vector: np.ndarray, **head: Any) -> RecordDict:
        """Itself with other numbers and fields, and the hash that goes with them: a liar can do that."""
        new = {**self.head, **head}
        bits = torch.from_numpy(vector)
        kind = getattr(torch, new["dtype"])
        name = content_hash(bits if bits.dtype == kind else bits.view(kind), new["manifest"])
        return replace(self, records=self.with_array(Array(vector))).with_head({**new, "name": name})


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


def lying_manifest(kind: Kind, random: Random) -> RecordDict:
    """Hash and all, so that the manifest itself must be looked at."""
    entries = json.loads(kind.head["manifest"] or '[["A", "q", [4, 6]]]')
    i = random.randrange(len(entries))
    side, module, shape = entries[i]
    n = int(np.prod(shape))
    lies: list[Any] = [
        *([side, word(random) + "+", shape], [s, module, shape] if (s := random.choice(["", "AB", "X", "a"])) else []),
        *([side, module, [*shape[::-1], 1]], [side, module, [n, 1, 1]], [side, module, [-d for d in shape]]),
        *([side, module, [2**32, 2**32, *shape]], [side, module, [0, 2**39, 2**39]], [side, module, [2**63]]),
        *([side, module, [float(d) for d in shape]], [side, module, [str(d) for d in shape]], [side, module, n]),
        *([side, module, [[d] for d in shape]], [side, module, [10**4000]], [side, module, [NAN]], [side, module]),
        *([side, module, shape, 1], [None, module, shape], [side, None, shape], [side, [module], shape], "ABC", {}, 3),
        *([side, module, None], [side, module, [True] * 9], [[side], module, shape], {"A": 1, "B": 2, "C": 3}, None),
    ]
    one = [*entries[:i], random.choice(lies), *entries[i + 1 :]]
    whole: list[Any] = [
        [*entries, entries[i]],
        entries[:i] + entries[i + 1 :],
        [*entries, *(["A", "x", [0]] for _ in SIZES)],
    ]
    many = [["A", str(j), [0]] for j in range(10**5 if random.random() < 0.01 else random.choice((10, 500)))]
    told = random.choice([one, one, one, one, *whole, many, {}, 3, "[]"])
    text = json.dumps(told)
    text = random.choice([text, text, text, text + ",", "[" * 5000])
    return kind.sealed(kind.vector, manifest=text)


def other_type(kind: Kind, random: Random) -> RecordDict:
    v = kind.vector
    types = ["i1", "i2", "i4", "i8", "u1", "u2", "f2", "f4", "f8", "c8", "?", ">f4", ">i8", "U4", "S3", "V4", "M8[s]"]
    to = random.choice([t for t in types if np.dtype(t) != v.dtype])
    two = np.zeros(len(v), [("x", v.dtype), ("y", v.dtype)])
    with np.errstate(all="ignore"):
        one = np.zeros(len(v), to) if to[0] in "USVM" else v.astype(to, casting="unsafe")
    return kind.with_array(Array(two if random.random() < 0.2 else one))


def other_shape(kind: Kind, random: Random) -> RecordDict:
    v = kind.vector
    n = random.randrange(len(v))
    shapes = [v[None], v[:, None], v[:n], np.concatenate([v, v[: n + 1]]), v[n], np.asfortranarray(v.reshape(1, -1, 1))]
    return kind.with_array(Array(np.asarray(random.choice(shapes))))


def other_fields(kind: Kind, random: Random) -> RecordDict:
    a = kind.records.array_records["array"]["vector"]
    shape = random.choice([(), (1,), (0,), (-1,), (*a.shape, 1), (a.shape[0] + 1,), (2**62, 2**62)])
    dtype = random.choice(["", "object", "float", "uint8", word(random)])
    stype = random.choice(["", "pickle", "torch", "npy"])
    told = [(dtype, a.shape, a.stype), (a.dtype, shape, a.stype), (a.dtype, a.shape, stype)]
    return kind.with_array(Array(*random.choice(told), a.data))


def other_bytes(kind: Kind, random: Random) -> RecordDict:
    """An array whose bytes are no vector in numpy's format, or more than one."""
    a = kind.records.array_records["array"]["vector"]
    rest = random.randbytes(random.choice(SIZES[1:]))
    many = [a.data[: random.randrange(len(a.data))], a.data + rest, rest, rest + a.data, header(random), zipped(random)]
    return kind.with_array(Array(a.dtype, a.shape, a.stype, random.choice([*many, b"\x93NUMPY" + rest, a.data * 2])))


def pickled(kind: Kind, random: Random) -> RecordDict:
    """An array of objects; who unpickles it makes a file."""
    code = b"cbuiltins\nopen\n(S'" + str(PICKLED).encode() + b"'\nS'w'\ntR."
    a = kind.records.array_records["array"]["vector"]
    dtype = random.choice(["'|O'", "[('x', '|O')]", "object", "'<f4'"])
    data = random.choice([code, npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': (1,), }}".encode(), code)])
    return kind.with_array(Array(a.dtype, a.shape, random.choice(["numpy.ndarray", "pickle"]), data))


def changed_number(kind: Kind, random: Random) -> RecordDict:
    """Another number, and the hash as it was; where there is no hash, one that cannot be counted."""
    v = kind.vector.copy()
    i = random.randrange(len(v))
    v[i : i + 1] = v[i : i + 1] + 1 if "name" in kind.head else -1
    return kind.with_array(Array(v))


def no_number(kind: Kind, random: Random) -> RecordDict:
    """One that is not finite, or too large, and the hash that goes with it; of masked numbers another count."""
    v, value = kind.vector.copy(), random.choice([NAN, INF, -INF, 1e9, -1e9, 1e30])
    if v.dtype == np.int32:
        return kind.sealed(v[: random.randrange(len(v))])
    if v.dtype == np.int8:
        scale = len(v) - 4 * random.randint(1, kind.head["scales"])
        v[scale : scale + 4] = np.array([value], np.float32).view(np.int8)
        return kind.sealed(v)
    with np.errstate(over="ignore"):
        v[random.randrange(len(v))] = value
    return kind.sealed(v)


def as_another_type(kind: Kind, random: Random) -> RecordDict:
    """Numbers of a type that was not asked for, in array, head and hash alike."""
    to = random.choice([t for t in ("int8", "int32", "int64") if t != kind.head["dtype"]])
    return kind.sealed(kind.vector.astype(to, casting="unsafe"), dtype=to)


def unasked(kind: Kind, random: Random) -> RecordDict:
    return kind.with_array(Array(np.zeros(random.choice(SIZES), random.choice(["f4", "i8", "i1"]))))


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
SEALED: list[Way] = [lying_manifest, lying_manifest, no_number, as_another_type]


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


def npy(header: bytes, body: bytes = b"", version: int = 1) -> bytes:
    """A file in numpy's format with this header."""
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + body


def header(random: Random) -> bytes:
    """A header that asks for too much, or that Python would choke on."""
    shape = random.choice(["(1000000000000,)", f"({2**63 - 1},)", f"({2**32}, {2**32})", "(-5,)", "(True,)", "()", "3"])
    dtype = random.choice(
        ["'<f4'", "'|V0'", "'(40,)<f4'", "'(1000000000,)<f4'", "'f4,f4,f4'", "'|O'", "'<f3'", "[[[[]]]]"]
    )
    plain = f"{{'descr': {dtype}, 'fortran_order': {random.random() < 0.5}, 'shape': {shape}, }}\n"
    long = random.choice(
        ["-" * 900, "(" * 900, "not " * 200, "1" + "+1" * 400, "a" + "()" * 400, "[" * 190 + "]" * 190]
    )
    return npy(random.choice([plain, plain, long]).encode(), b"\0" * random.choice(SIZES), random.choice((1, 2, 3, 9)))


def zipped(random: Random) -> bytes:
    """Arrays in a zip file, of a hundred times its size."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(random.choice(["vector.npy", "arr_0.npy", "../x"]), bytes(random.choice((10, 10**4, 10**5))))
    return out.getvalue()
