"""An adapter as one vector of all its numbers, and back."""

import torch
from torch import Tensor

from .lora import LoRA
from .tensors import by_name, to_adapter


def to_vector(lora: LoRA, dtype: torch.dtype) -> Tensor:
    """All numbers of the adapter in one vector, in the order of its sides and modules: (n,)."""
    vectors = [t.detach().reshape(-1).to("cpu", dtype) for _, _, t in lora.matrices()]
    return torch.cat(vectors) if vectors else torch.empty(0, dtype=dtype)


def from_vector(vector: Tensor, like: LoRA) -> LoRA:
    """The adapter with the names and shapes of `like` and the numbers of `vector`, in the vector's type."""
    shapes = {name: t.shape for name, t in by_name(like).items()}
    sizes = [shape.numel() for shape in shapes.values()]
    if sum(sizes) != vector.numel():
        raise ValueError(f"the adapter has {sum(sizes)} numbers, the vector has {vector.numel()}")
    pieces = zip(shapes.items(), torch.split(vector, sizes), strict=True)
    return to_adapter({name: piece.view(shape) for (name, shape), piece in pieces})
