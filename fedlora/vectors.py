"""An adapter as one vector with a manifest, named by the hash of its content."""

import json
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from .lora import LoRA, from_matrices


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """A LoRA as one vector, and the manifest that says what lies where in it."""

    vector: Tensor  # (n,)
    manifest: str  # JSON: [[side, module, shape], ...] in the order of the vector
    name: str  # sha256 of type, manifest and bytes

    @property
    def nbytes(self) -> int:
        return self.vector.numel() * self.vector.element_size()


def flatten(lora: LoRA, dtype: torch.dtype = torch.float32) -> FlatAdapter:
    """The adapter as one vector, in the order of its sides and modules."""
    items = list(lora.matrices())
    manifest = json.dumps([[s, m, list(t.shape)] for s, m, t in items])
    vectors = [t.detach().reshape(-1).to("cpu", dtype) for _, _, t in items]
    vector = torch.cat(vectors) if vectors else torch.empty(0, dtype=dtype)
    return FlatAdapter(vector, manifest, content_hash(vector, manifest))


def content_hash(vector: Tensor, manifest: str) -> str:
    """The name of a flat adapter: a hash of its type, its manifest and its bytes."""
    digest = sha256(f"{vector.dtype}{manifest}".encode())
    digest.update(vector.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count(manifest: str) -> int:
    """How many numbers a manifest names."""
    return sum(torch.Size(shape).numel() for _, _, shape in json.loads(manifest))


def unflatten(vector: Tensor, manifest: str) -> LoRA:
    """The adapter that `flatten` made a vector of, in the vector's own type."""
    entries = json.loads(manifest)
    sizes = [torch.Size(shape).numel() for _, _, shape in entries]
    if sum(sizes) != vector.numel():
        raise ValueError(f"the manifest names {sum(sizes)} numbers, the vector has {vector.numel()}")
    pieces = zip(entries, torch.split(vector, sizes), strict=True)
    return from_matrices((side, module, piece.view(shape)) for (side, module, shape), piece in pieces)
