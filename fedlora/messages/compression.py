"""Small uploads: the change since a job's start, in bfloat16 or in int8 with scales, and what rounding left out.

Seide et al., 1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech DNNs
(Interspeech 2014): what quantisation left out is added to what is sent next. Karimireddy et al., Error Feedback Fixes
SignSGD and other Gradient Compression Schemes (ICML 2019), https://arxiv.org/abs/1901.09847: with that, SGD keeps its
rate for any compression C with |C(x) - x|^2 <= (1 - d) |x|^2, d > 0.

    m = lora - start + e,   p = C(m),   received = start + p,   e <- m - p

so that after any number of rounds the sum of what was received is the sum of what was meant, less the last e.

Catches: e waits until its client is asked again, and then weighs as much as if it were fresh: with few of many clients
asked a round it saves little, and with a tenth it can do harm (benchmarks/messages.py). And e is a change of the same
factors in the same basis: where a strategy starts factors anew or turns them (`continues` is false), or a job resumes,
give no residual.

In int8 a scale is shared by the numbers of one of the r directions, a row of A and a column of B: r scales a matrix
cost next to nothing. The other way, a scale for every r numbers, costs half as much again as the numbers at r = 8, and
after AdamW takes a fifth off the error (MiniLM, three steps: 0.27 % for 0.33 %). It takes off nine tenths only of
SGD's A, 4 %, where few inputs have nearly all of the gradient. Sides H, R and D go by rows, a core in blocks (h, k, k)
by the rows of all its blocks; a vector has one scale.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedlora.errors import TrainingDiverged
from fedlora.jobs import CompressedUpdate
from fedlora.lora import LoRA, from_matrices, map_factors
from fedlora.sections import Encoding
from fedlora.tensors import by_name

DTYPES: dict[Encoding, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
LARGEST = 127  # of an int8, on both sides of zero
SMALLEST = 2.0**-126  # of a scale; a row below 127 times this, 1.5e-36, is taken for zero: some machines have no less


def compress(delta: LoRA, encoding: Encoding) -> CompressedUpdate:
    """The change rounded to nearest, ties to even. Raises `TrainingDiverged` for a matrix not finite in float32."""
    delta = _each(delta, lambda s, m, t: _finite(s, m, t.float()).contiguous())
    if encoding == "int8":
        scales = _each(delta, lambda s, m, t: _scales(_rows(s, t)))
        return CompressedUpdate(encoding, _each(delta, lambda s, m, t: _quantised(s, t, scales.side(s)[m])), scales)
    dtype = DTYPES[encoding]
    most = torch.finfo(dtype).max  # float32's largest numbers would round to bfloat16's infinity
    return CompressedUpdate(encoding, map_factors(lambda t: t.clamp(-most, most).to(dtype), delta), LoRA())


def decompress(packed: CompressedUpdate) -> LoRA:
    """The change in float32: the very numbers that both sides reckon with, exact products on any machine.

    Raises `ValueError` where types, counts and scales are none that `compress` could have made.
    """
    _check_types(packed)
    _check_scales(packed)
    if packed.encoding != "int8":
        return map_factors(torch.Tensor.float, packed.numbers)
    return _each(packed.numbers, lambda s, m, t: _scaled(s, t, packed.scales.side(s)[m]))


def restore(start: LoRA, packed: CompressedUpdate) -> LoRA:
    """What the server takes for the client's matrices: `start`, where it has them, and the change."""
    return _each(decompress(packed), lambda s, m, t: _of(start, s, m, t) + t)


def compress_with_error_feedback(
    start: LoRA, lora: LoRA, residual: LoRA, encoding: Encoding
) -> tuple[CompressedUpdate, LoRA, LoRA]:
    """What travels of a trained `lora`, what the server then has, and what is left for this client's next round.

    A matrix that the residual lacks, or has in another shape, counts as zero there. Raises `TrainingDiverged`.
    """
    meant = _each(lora, lambda s, m, t: t.float() - _of(start, s, m, t) + _of(residual, s, m, t))
    packed = compress(meant, encoding)
    sent = decompress(packed)
    return packed, restore(start, packed), map_factors(torch.sub, meant, sent)


def _finite(side: str, module: str, matrix: Tensor) -> Tensor:
    """The matrix, where all of its numbers are finite. Raises `TrainingDiverged`."""
    if not bool(torch.isfinite(matrix).all()):
        raise TrainingDiverged(
            f"the change of {side} of {module} is not finite, and would spoil what is sent after it; "
            "a lower train.lr may help"
        )
    return matrix


def _check_types(packed: CompressedUpdate) -> None:
    """Raise `ValueError` for numbers that are not of the encoding's type, or scales that are not float32."""
    for part, dtype in ((packed.numbers, DTYPES[packed.encoding]), (packed.scales, torch.float32)):
        for name, t in by_name(part).items():
            if t.dtype != dtype:
                raise ValueError(f"{packed.encoding} came as {t.dtype} in {name}; it takes {dtype}")


def _check_scales(packed: CompressedUpdate) -> None:
    """Raise `ValueError` where there is not one finite scale, 0 or more, for every row of the numbers."""
    wanted = _row_counts(packed.numbers) if packed.encoding == "int8" else {}
    found = {name: tuple(t.shape) for name, t in by_name(packed.scales).items()}
    if found != wanted:
        total = sum(n for (n,) in wanted.values())
        raise ValueError(
            f"these numbers take {total} scales in {packed.encoding}, {packed.scales.numel()} came, or for other rows"
        )
    for _, _, t in packed.scales.matrices():
        if not bool(((t >= 0) & (t < torch.inf)).all()):
            raise ValueError("a scale is negative, infinite or no number")


def _row_counts(numbers: LoRA) -> dict[str, tuple[int]]:
    """The shape of every matrix's scales, by the name of the matrix."""
    return {f"{s} {m}": (len(_rows(s, t.contiguous())),) for s, m, t in numbers.matrices()}


def _scales(rows: Tensor) -> Tensor:
    """The scale of every row of (rows, n): its largest number is 127 of them.

    A scale keeps 16 of its 24 bits, rounded down: then every q times it is exact, and the largest is still 127.
    """
    largest = rows.abs().amax(1) if rows.numel() else torch.zeros(len(rows))
    scales = ((largest / LARGEST).view(torch.int32) & ~0xFF).view(torch.float32)
    return torch.where(scales < SMALLEST, 0.0, scales)


def _quantised(side: str, matrix: Tensor, scales: Tensor) -> Tensor:
    """The matrix in int8: x is about q times the scale of its row."""
    rows, column = _rows(side, matrix).double(), scales[:, None].double()
    numbers = torch.empty(matrix.shape, dtype=torch.int8)
    _rows(side, numbers).copy_(torch.where(column > 0, rows / column, 0.0).round())
    return numbers


def _scaled(side: str, numbers: Tensor, scales: Tensor) -> Tensor:
    """The matrix in float32, every row of int8 times its scale."""
    matrix = numbers.float().contiguous()
    _rows(side, matrix).mul_(scales[:, None])
    return matrix


def _rows(side: str, t: Tensor) -> Tensor:
    """A view of the matrix in which a row shares a scale: (rows, n)."""
    if not t.numel():
        return t.view(0, 0)
    if t.dim() < 2:
        return t.view(1, -1)
    if side == "B" and t.dim() == 2:
        return t.T
    return t.view(-1, t.shape[-1]) if side == "R" else t.view(t.shape[0], -1)


def _of(lora: LoRA, side: str, module: str, like: Tensor) -> Tensor:
    """This matrix in float32 on the CPU; zeros where there is none of that shape."""
    found = lora.side(side).get(module)
    if found is None or found.shape != like.shape:
        return torch.zeros(like.shape)
    return found.detach().to("cpu", torch.float32)


def _each(lora: LoRA, change: Callable[[str, str, Tensor], Tensor]) -> LoRA:
    """The adapter with every matrix changed, told its side and its module."""
    return from_matrices((s, m, change(s, m, t.detach().cpu())) for s, m, t in lora.matrices())
