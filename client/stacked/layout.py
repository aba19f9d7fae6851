"""Where every number of an adapter lies in a row of theta: the adapters of many clients are one matrix (clients, P).

Clipping, FedProx and the optimizers are then a few operations on that matrix, however many modules there are, and a
micro-batch gathers what its rows need by one index. The columns that are trained come first, so that gradients and
moments are (clients, P_t) over the same columns. B lies transposed, (r, d_out): products with it are then as fast as
those with A. A client whose rank is lower than another's is filled up with zeros, which stay zeros: where a row of A
and its column of B are both zero, so are their gradients, and what weight decay takes of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedlora.lora import LoRA, from_matrices

Key = tuple[str, str]  # the side and the module of a matrix
SUBTRACTED = {"A": "a", "B": "b"}  # sides of the frozen pair beside the weights of a client that resumes


@dataclass(frozen=True)
class Column:
    """The columns of theta in which one matrix lies."""

    begin: int
    end: int
    shape: tuple[int, ...]  # as it lies there: A (r, d_in), B (r, d_out), R (r, r), H as its parameter


@dataclass(frozen=True)
class Layout:
    """The columns of theta by the side and module of their matrices."""

    columns: Mapping[Key, Column]
    trained: int  # the count of columns that are trained, P_t: they are the first ones

    @property
    def size(self) -> int:
        """The count of all columns, P."""
        return max((column.end for column in self.columns.values()), default=0)

    def flat(self, lora: LoRA, subtracted: LoRA, dtype: torch.dtype) -> Tensor:
        """The row of theta of a client with this adapter, beside weights from which a product is subtracted: (P,)."""
        row = torch.zeros(self.size, dtype=dtype)
        for key, matrix in _matrices(lora, subtracted):
            place = self.view(row[None], key)[0]
            place[tuple(slice(n) for n in matrix.shape)] = matrix.to(dtype)
        return row

    def lora(self, row: Tensor, like: LoRA) -> LoRA:
        """The adapter that lies in a row of theta, a copy on the CPU with the sides, ranks and types of `like`."""

        def matrix(side: str, module: str, wanted: Tensor) -> Tensor:
            found = self.view(row[None], (side, module))[0]
            found = found.T if side == "B" else found
            own = found[tuple(slice(n) for n in wanted.shape)]
            return own.to("cpu", copy=True, memory_format=torch.contiguous_format)

        return from_matrices((side, module, matrix(side, module, t)) for side, module, t in like.matrices())

    def view(self, rows: Tensor, key: Key) -> Tensor:
        """The matrices of one side and module in rows of theta, or of its first P_t columns: (rows, *shape)."""
        column = self.columns[key]
        return rows[:, column.begin : column.end].view(len(rows), *column.shape)

    def is_trained(self, key: Key) -> bool:
        """Is there such a matrix, and is it trained?"""
        return key in self.columns and self.columns[key].end <= self.trained


def layout_of(adapters: Sequence[LoRA], trains: str, subtracted: Sequence[LoRA] = ()) -> Layout:
    """The layout of adapters that have the same modules, of any ranks, and of the pairs subtracted from the weights.

    The sides in `trains` are trained.
    """
    shapes: dict[Key, tuple[int, ...]] = {}
    for i, lora in enumerate(adapters):
        for key, matrix in _matrices(lora, subtracted[i] if subtracted else LoRA()):
            shapes[key] = tuple(map(max, shapes.get(key, matrix.shape), matrix.shape))
    ordered = sorted(shapes, key=lambda key: key[0] not in trains)  # stable: sides and modules in their order
    columns, end = {}, 0
    for key in ordered:
        begin, end = end, end + prod(shapes[key])
        columns[key] = Column(begin, end, shapes[key])
    trained = max((c.end for key, c in columns.items() if key[0] in trains), default=0)
    return Layout(columns, trained)


def _matrices(lora: LoRA, subtracted: LoRA) -> list[tuple[Key, Tensor]]:
    """Every matrix as it lies in theta, with its side and module: of B its transpose."""
    own = [(side, module, t) for side, module, t in lora.matrices()]
    beside = [(SUBTRACTED[side], module, t) for side, module, t in subtracted.matrices()]
    return [((side, module), t.T if side in "Bb" else t) for side, module, t in (*own, *beside)]
