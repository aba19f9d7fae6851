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
SGD's A, 4 %, where few inputs have nearly all of the gradient. Sides H, R and D go by rows; a vector has one scale.
"""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from fedlora.errors import TrainingDiverged
from fedlora.jobs import CompressedUpdate
from fedlora.lora import LoRA, from_matrices, map_factors
from fedlora.sections import Encoding
from fedlora.vectors import flatten, unflatten

DTYPES: dict[Encoding, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
LARGEST = 127  # of an int8, on both sides of zero
SMALLEST = 2.0**-126  # of a scale; a row below 127 times this, 1.5e-36, is taken for zero: some machines have no less


def compress(delta: LoRA, encoding: Encoding) -> CompressedUpdate:
    """The change rounded to nearest, ties to even. Raises `TrainingDiverged` for a matrix not finite in float32."""
    for s, m, t in delta.matrices():
        if not bool(torch.isfinite(t.float()).all()):
            raise TrainingDiverged(
                f"the change of {s} of {m} is not finite, and would spoil what is sent after it; "
                "a lower train.lr may help"
            )
    flat = flatten(delta)
    none = torch.empty(0)
    if encoding == "int8":
        pairs = [_quantise(s, t) for s, _, t in delta.matrices()]
        numbers = torch.cat([q for q, _ in pairs]) if pairs else torch.empty(0, dtype=torch.int8)
        return CompressedUpdate(encoding, numbers, torch.cat([none, *(scale for _, scale in pairs)]), flat.manifest)
    most = torch.finfo(DTYPES[encoding]).max  # float32's largest numbers would round to bfloat16's infinity
    return CompressedUpdate(encoding, flat.vector.clamp(-most, most).to(DTYPES[encoding]), none, flat.manifest)


def decompress(packed: CompressedUpdate) -> LoRA:
    """The change in float32: the very numbers that both sides reckon with, exact products on any machine.

    Raises `ValueError` where types, counts and scales are none that `compress` could have made.
    """
    if packed.numbers.dtype != DTYPES[packed.encoding] or packed.scales.dtype != torch.float32:
        raise ValueError(f"{packed.encoding} came as {packed.numbers.dtype}, with scales of {packed.scales.dtype}")
    entries = json.loads(packed.manifest)
    counts = [_rows(s, torch.empty(shape, device="meta")).shape[0] for s, _, shape in entries]
    wanted = sum(counts) if packed.encoding == "int8" else 0
    if packed.scales.numel() != wanted:
        raise ValueError(f"the manifest names {wanted} scales in {packed.encoding}, {packed.scales.numel()} came")
    if not bool(((packed.scales >= 0) & (packed.scales < torch.inf)).all()):
        raise ValueError("a scale is negative, infinite or no number")
    lora = unflatten(packed.numbers.float(), packed.manifest)
    if packed.encoding == "int8":
        for (s, m, _), scale in zip(entries, torch.split(packed.scales, counts), strict=True):
            _rows(s, lora.side(s)[m]).mul_(scale[:, None])
    return lora


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


def _quantise(side: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 in the matrix's own order, and a scale a row: x is about q times its row's scale.

    A scale keeps 16 of its 24 bits, rounded down: then every q times it is exact, and the largest is still 127.
    """
    t = matrix.detach().to("cpu", torch.float32).contiguous()
    rows = _rows(side, t)
    most = rows.abs().amax(1) if t.numel() else torch.empty(0)
    scales = ((most / LARGEST).view(torch.int32) & ~0xFF).view(torch.float32)
    scales = torch.where(scales < SMALLEST, 0.0, scales)
    q = torch.where(scales[:, None] > 0, rows.double() / scales[:, None].double(), 0.0).round()
    numbers = torch.empty(t.shape, dtype=torch.int8)
    _rows(side, numbers).copy_(q)
    return numbers.reshape(-1), scales


def _rows(side: str, t: Tensor) -> Tensor:
    """A view of the matrix in which a row shares a scale: (rows, n)."""
    if not t.numel():
        return t.view(0, 0)
    if t.dim() < 2:
        return t.view(1, -1)
    return t.T if side == "B" and t.dim() == 2 else t.view(t.shape[0], -1)


def _of(lora: LoRA, side: str, module: str, like: Tensor) -> Tensor:
    """This matrix in float32 on the CPU; zeros where there is none of that shape."""
    found = lora.side(side).get(module)
    if found is None or found.shape != like.shape:
        return torch.zeros(like.shape)
    return found.detach().to("cpu", torch.float32)


def _each(lora: LoRA, change: Callable[[str, str, Tensor], Tensor]) -> LoRA:
    """The adapter with every matrix changed, told its side and its module."""
    return from_matrices((s, m, change(s, m, t.detach().cpu())) for s, m, t in lora.matrices())
