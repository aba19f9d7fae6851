"""The number type in which the products of the frozen base are computed: float32, bfloat16, or both mixed.

`bf16` is a base in bfloat16 (`model.dtype`), whose activations are too. `mixed` keeps weights and activations in
float32 and computes only the products of frozen linear layers in bfloat16, from a second copy of their weights; its
norms, softmax, losses, factors and optimizer are those of float32. Either pays where a processor has instructions for
it. Elsewhere torch computes such products number by number. Milliseconds on one thread of a Zen 3, which has none, for
400 tokens:

    | product (tokens, d_in) (d_in, d_out)    | float32 | bfloat16 |
    |-----------------------------------------|---------|----------|
    | 576 to 1536, forward                    | 9.2     | 77       |
    | the same, backward                      | 8.0     | 314      |
    | 576 to 49152 (output layer), forward    | 340     | 2,377    |
    | the same, backward                      | 258     | 33,829   |

so that a step of SmolLM2-135M in bfloat16 takes more than ten times as long there, most of it in the backward pass of
the output layer. On a Zen 4 with AVX512_BF16 a training step of MiniLM in bfloat16 was 1.5 times as fast as in float32.
`speed_of_bfloat16` finds out where a run is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.models.model import Model

from .replaced import forwards_of

TOKENS = 64  # of the products that are timed
REPEATS = 3


def set_precision(model: Model, precision: str) -> None:
    """Let the model's base compute in this precision from here on; all but `mixed` is in its number type already.

    Where bfloat16 is the slower one here, the model's notes say so.
    """
    if precision == "mixed":
        model.products = mixed_products(model)
        model.keep_offset_beside()  # folded into a weight it would be rounded away
    if precision == "mixed" or model.dtype == "bfloat16":
        speed = speed_of_bfloat16(model.net)
        model.notes += (_slow(speed),) if speed < 1 else ()


def _slow(speed: float) -> str:
    return (
        f"products in bfloat16 take {1 / speed:.1f} times as long as in float32 on this machine; precision = fp32 is "
        "faster here"
    )


def mixed_products(model: Model) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the frozen linear layers of the base compute in bfloat16, between activations in float32."""
    trained = {id(p) for p in model.set_trainable("ABRSH")}
    frozen = [m for m in model.net.modules() if type(m) is nn.Linear and id(m.weight) not in trained]
    forwards: dict[nn.Module, Callable[..., Tensor]] = {
        module: partial(_forward, _in_bfloat16(module.weight), _in_bfloat16(module.bias)) for module in frozen
    }

    @contextmanager
    def products() -> Iterator[None]:
        # what another has replaced already, as the output layer in `losses`, stays replaced
        free = {module: forward for module, forward in forwards.items() if "forward" not in module.__dict__}
        with forwards_of(free):
            yield

    return products


def speed_of_bfloat16(net: nn.Module) -> float:
    """How many times as fast as in float32 this network's products are in bfloat16 here; measured in milliseconds.

    It is measured on the layer of median size, forward and backward, once a process for each shape.
    """
    shapes = sorted((m.out_features, m.in_features) for m in net.modules() if isinstance(m, nn.Linear))
    if not shapes:
        return 1.0
    largest = sorted(shapes, key=lambda shape: shape[0] * shape[1])
    return _speed(largest[len(largest) // 2], next(net.parameters()).device.type)


@cache
def _speed(shape: tuple[int, int], device: str) -> float:
    seconds = {dtype: _seconds(shape, dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return seconds[torch.float32] / seconds[torch.bfloat16]


@torch.no_grad()
def _seconds(shape: tuple[int, int], dtype: torch.dtype, device: str) -> float:
    """The time of a product and of that of its backward pass; on a CPU of this thread alone, whatever others do."""
    weight = torch.ones(shape, dtype=dtype, device=device)
    x = torch.ones(TOKENS, shape[1], dtype=dtype, device=device)
    found = []
    for _ in range(REPEATS + 1):
        start = _now(device)
        F.linear(x, weight) @ weight
        found.append(_now(device) - start)
    return max(median(found[1:]), 1e-9)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


class _Product(torch.autograd.Function):
    """x W^T + b with W in another number type than x, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradients[0].to(weight.dtype) @ weight).to(gradients[0].dtype), None, None


def _forward(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _in_bfloat16(parameter: Tensor | None) -> Any:
    return None if parameter is None else parameter.detach().to(torch.bfloat16)
