"""Where every number of an adapter lies in a row of theta: the adapters of many clients are one matrix (clients, P).

Clipping, FedProx and the optimizers are then a few operations on that matrix, however many modules there are, and a
micro-batch gathers what its rows need by one index. The columns that are trained come first, so that gradients and
moments are (clients, P_t) over the same columns. B lies transposed, (r, d_out): products with it are then as fast as
those with A. A client whose rank is lower than another's is filled up with zeros, which stay zeros: where a row of A
and its column of B are both zero, so are their gradients, and what weight decay takes of them. Scales of a core's heads
are trained beside the core, and in it where an adapter is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedlora.lora import SIDES, LoRA, from_matrices
from fedlora.models.cores import folded, head_scales

Key = tuple[str, str]  # the side and the module of a matrix
SUBTRACTED = {"A": "a", "B": "b"}  # sides of the frozen pair beside the weights of a client that resumes


@dataclass(frozen=True)
class Column:
    """The columns of theta in which one matrix lies."""

    begin: int
    end: int
    shape: tuple[int, ...]  # as it lies there: A (r, d_in), B (r, d_out), S (h,), R and H as their parameters


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
        return self._row(_matrices(lora, subtracted, scales=self.has_scales), dtype)

    def flat_correction(self, correction: LoRA, dtype: torch.dtype) -> Tensor:
        """What a job adds to the gradient of a client's row of theta, (P,); scales are not corrected."""
        return self._row(_matrices(correction, LoRA(), scales=False), dtype)

    def _row(self, matrices: Iterable[tuple[Key, Tensor]], dtype: torch.dtype) -> Tensor:
        row = torch.zeros(self.size, dtype=dtype)
        for key, matrix in matrices:
            place = self.view(row[None], key)[0]
            place[tuple(slice(n) for n in matrix.shape)] = matrix.to(dtype)
        return row

    def lora(self, row: Tensor, like: LoRA) -> LoRA:
        """The adapter that lies in a row of theta, a copy on the CPU with the sides, ranks and types of `like`."""

        def matrix(side: str, module: str, wanted: Tensor) -> Tensor:
            found = self.view(row[None], (side, module))[0]
            found = found.T if side == "B" else found
            own = found[tuple(slice(n) for n in wanted.shape)]
            if side == "R" and self.has_scales:
                own = folded(own, self.view(row[None], ("S", module))[0])
            return own.to("cpu", copy=True, memory_format=torch.contiguous_format)

        return from_matrices((side, module, matrix(side, module, t)) for side, module, t in like.matrices())

    @property
    def has_scales(self) -> bool:
        """Do the heads of the cores have scales that are trained?"""
        return any(side == "S" for side, _ in self.columns)

    def view(self, rows: Tensor, key: Key) -> Tensor:
        """The matrices of one side and module in rows of theta, or of its first P_t columns: (rows, *shape)."""
        column = self.columns[key]
        return rows[:, column.begin : column.end].view(len(rows), *column.shape)

    def columns_of(self, sides: str) -> slice:
        """The columns of all matrices of these sides, which lie beside each other: of one side, or all trained ones."""
        own = [column for (side, _), column in self.columns.items() if side in sides]
        return slice(min((c.begin for c in own), default=0), max((c.end for c in own), default=0))

    def is_trained(self, key: Key) -> bool:
        """Is there such a matrix, and is it trained?"""
        return key in self.columns and self.columns[key].end <= self.trained


def layout_of(adapters: Sequence[LoRA], trains: str, subtracted: Sequence[LoRA] = ()) -> Layout:
    """The layout of adapters that have the same modules, of any ranks, and of the pairs subtracted from the weights.

    The sides in `trains` are trained, and with S among them scales of the heads of R.
    """
    shapes: dict[Key, tuple[int, ...]] = {}
    for i, lora in enumerate(adapters):
        for key, matrix in _matrices(lora, subtracted[i] if subtracted else LoRA(), scales="S" in trains):
            shapes[key] = tuple(map(max, shapes.get(key, matrix.shape), matrix.shape))
    order = f"{SIDES}S{''.join(SUBTRACTED.values())}"
    ordered = sorted(shapes, key=lambda key: (key[0] not in trains, order.index(key[0])))  # stable: modules in order
    columns, end = {}, 0
    for key in ordered:
        begin, end = end, end + prod(shapes[key])
        columns[key] = Column(begin, end, shapes[key])
    trained = max((c.end for key, c in columns.items() if key[0] in trains), default=0)
    return Layout(columns, trained)


def core_forms(lora: LoRA) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The modules with a core, and the shape of those that are in blocks: such blocks fill up to no other shape."""
    return tuple((m, tuple(core.shape) if core.dim() == 3 else ()) for m, core in lora.R.items())


def _matrices(lora: LoRA, subtracted: LoRA, *, scales: bool) -> list[tuple[Key, Tensor]]:
    """Every matrix as it lies in theta, with its side and module: of B its transpose, and scales as they begin."""
    own = [(side, module, t) for side, module, t in lora.matrices()]
    own += [("S", module, head_scales(core)) for module, core in lora.R.items() if scales]
    beside = [(SUBTRACTED[side], module, t) for side, module, t in subtracted.matrices()]
    return [((side, module), t.T if side in "Bb" else t) for side, module, t in (*own, *beside)]
