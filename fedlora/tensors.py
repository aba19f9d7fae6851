"""Named tensors as bytes and back: safetensors, the one form that numbers have in messages and in files.

Its parser (https://github.com/huggingface/safetensors) unpickles nothing and refuses bytes whose offsets overlap, leave
gaps or end elsewhere than the bytes do, products of dimensions that overflow, and types that it does not know. What it
leaves open is bounded here before or right after it is called: the size of the header, and with it the number of
tensors, the types, and dimensions that torch cannot hold. How many bytes there may be is for the caller to say.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import CheckpointError, WireError
from .lora import SIDES, LoRA

MOST_HEADER = 8 * 2**20  # bytes of a header, of which a tensor takes about 100
MOST_DIMENSIONS = 8
Form = tuple[str, tuple[int, ...]]  # of a tensor: its number type by safetensors' name, and its shape
MOST_NUMBERS = 2**48  # of a tensor, dimensions of 0 taken for 1: torch cannot lay out more
WITHOUT_HASH = frozenset(  # the metadata of the first files of version 0.1, which held no hash of their content
    {"round", "tree", "manifest", "name", "job", "examples", "loss", "spent"}
)
DTYPES = {  # in which numbers travel, by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The tensors in the safetensors format; equal tensors give equal bytes, in whatever order they are named."""
    own = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}  # none may share memory
    return save(own, metadata=metadata)


def from_bytes(content: bytes, most_header: int = MOST_HEADER) -> dict[str, Tensor]:
    """The tensors that `to_bytes` wrote, sorted by name. Raises `WireError` for bytes that are anything else."""
    header = _header_size(content)
    if header > most_header:
        raise WireError(f"the header of these numbers has {header} bytes; {most_header} are the most")
    try:
        views = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as e:
        raise WireError(f"these numbers are not in the safetensors format: {e}") from e
    return {name: _tensor(name, view) for name, view in sorted(views, key=itemgetter(0))}


def number_bytes(content: bytes) -> int:
    """How many of the bytes are numbers, and not the header that names them."""
    return max(len(content) - 8 - _header_size(content), 0)


def forms(content: bytes) -> dict[str, Form]:
    """The number type and the shape of every tensor in these bytes, by name, from the header that they begin with.

    Raises `WireError` where the bytes hold anything beside these tensors.
    """
    end = 8 + _header_size(content)
    try:
        header = {
            name: (e["dtype"], tuple(e["shape"]), e["data_offsets"]) for name, e in json.loads(content[8:end]).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise WireError(f"these numbers are not in the safetensors format: {e}") from e
    if sum(last - first for *_, (first, last) in header.values()) != len(content) - end:
        raise WireError("these numbers have bytes that belong to no tensor")
    return {name: (dtype, shape) for name, (dtype, shape, _) in header.items()}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' names, types, shapes and numbers."""
    digest = sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.view(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return digest.hexdigest()


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a file of these tensors and metadata, with a hash of both by which `read_file` sees damage."""
    return to_bytes(tensors, {**metadata, "sha256": _file_hash(checksum(tensors), metadata)})


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file. Raises `CheckpointError` for one that is not as it was written."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {name: f.get_tensor(name) for name in sorted(f.keys())}
            metadata: dict[str, str] = f.metadata() or {}
    except Exception as e:  # a damaged header can name any type, shape or place, and each fails in its own way
        raise CheckpointError(f"{path} cannot be read: {e}") from e
    if not _is_as_written(tensors, metadata):
        raise CheckpointError(f"{path} is damaged: its content is not what was written")
    return tensors, metadata


def _is_as_written(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether the hash in a file is that of its content: of all of it or, in files of version 0.1, of its tensors."""
    others = {key: value for key, value in metadata.items() if key != "sha256"}
    if "sha256" not in metadata:
        return WITHOUT_HASH.issuperset(others)
    found = checksum(tensors)
    return metadata["sha256"] in (_file_hash(found, others), found)


def _file_hash(tensors: str, metadata: Mapping[str, str]) -> str:
    """SHA-256 of a file's metadata and of the hash of its tensors."""
    return sha256(repr((sorted(metadata.items()), tensors)).encode()).hexdigest()


def by_name(lora: LoRA) -> dict[str, Tensor]:
    """The matrices of an adapter by the names under which they travel: `SIDE MODULE`."""
    return {f"{side} {module}": t for side, module, t in lora.matrices()}


def to_adapter(tensors: Mapping[str, Tensor]) -> LoRA:
    """The adapter whose matrices these are. Raises `WireError` for a name that `by_name` does not give."""
    sides: dict[str, dict[str, Tensor]] = {side: {} for side in SIDES}
    for name, t in tensors.items():
        side, space, module = name.partition(" ")
        if side not in sides or not space:
            raise WireError(f"a tensor is called {name!r}; it takes a side, one of {', '.join(SIDES)}, and a module")
        sides[side][module] = t
    return LoRA(**sides)


def _header_size(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def _tensor(name: str, view: Mapping[str, Any]) -> Tensor:
    """A tensor over the bytes that safetensors' parser gave it."""
    dtype, shape = DTYPES.get(view["dtype"]), view["shape"]
    if dtype is None:
        raise WireError(f"the tensor {name!r} is of {view['dtype']}; numbers travel in {', '.join(DTYPES)}")
    if len(shape) > MOST_DIMENSIONS or prod(max(n, 1) for n in shape) > MOST_NUMBERS:
        raise WireError(f"the tensor {name!r} has shape {shape}, which no machine can hold")
    if not view["data"]:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(view["data"], dtype=dtype).view(shape)
