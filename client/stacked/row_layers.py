"""What a layer computes where every row has weights of its own, with backward passes that are written by hand.

The gradients of a row's own weights do not go through autograd: they are handed to `write` within the backward pass,
which puts them where they belong in G (rows, P_t). So nothing is held, padded or copied that autograd would.

    y = y_0 + s (x A^T) R^T B^T        x (rows, tokens, d_in), A (rows, r, d_in), R (rows, r, r), B^T (rows, r, d_out)

R may be blocks on a diagonal, (rows, h, k, k) with h k = r, and each of its h heads may have a scale of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Write = Callable[[str, Tensor], None]  # takes the side of a matrix and its gradient, (rows, *shape)
Scale = float | Tensor  # s of all rows, or of each: (rows, 1, 1)


@dataclass(frozen=True)
class Factors:
    """The low-rank product of one module, for every row of a batch."""

    A: Tensor  # (rows, r, d_in)
    Bt: Tensor  # (rows, r, d_out)
    R: Tensor | None  # (rows, r, r), or (rows, h, k, k)
    heads: Tensor | None  # (rows, h): the scales of R's heads, where they are trained
    s: Scale
    trains: str  # the letters of the sides that have gradients
    write: Write


def add_product(y: Tensor, x: Tensor, anchor: Tensor, factors: Factors) -> Tensor:
    """y plus the product of each row, in the type of y; y (rows, tokens, d_out), x (rows, tokens, d_in).

    `anchor` is a scalar that requires a gradient and gets none: without it the first adapted layer, whose x requires
    none, would have no backward pass.
    """
    out: Tensor = _AddProduct.apply(y, x, anchor, factors)  # type: ignore[no-untyped-call]
    return out


def linear_with_product(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, factors: Factors) -> Tensor:
    """A frozen linear layer (d_out, d_in) and the product of each row beside it, in one step and of one type."""
    out: Tensor = _LinearWithProduct.apply(x, weight, bias, anchor, factors)  # type: ignore[no-untyped-call]
    return out


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, write: Write) -> Tensor:
    """A linear layer with a weight (rows, d_out, d_in) and a bias (rows, d_out) for each row; their sides are `weight`
    and `bias` to `write`."""
    out: Tensor = _RowLinear.apply(x, weight, bias, anchor, write)  # type: ignore[no-untyped-call]
    return out


def row_affine(x: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, write: Write) -> Tensor:
    """The scale and shift at the end of a layer norm, (rows, d) each, of x (rows, tokens, d); else as `row_linear`."""
    out: Tensor = _RowAffine.apply(x, weight, bias, anchor, write)  # type: ignore[no-untyped-call]
    return out


def _inner(factors: Factors, x: Tensor) -> tuple[Tensor, Tensor]:
    """x A^T and s (x A^T) R^T: (rows, tokens, r) each."""
    h = torch.bmm(x, factors.A.transpose(1, 2))
    through = h if factors.R is None else _times_core(h, factors.R)
    if factors.heads is not None:
        through = _times_heads(through, factors.heads)
    return h, through * factors.s


def _times_core(h: Tensor, core: Tensor) -> Tensor:
    """Each row's h R^T: (rows, tokens, r)."""
    if core.dim() == 3:
        return torch.bmm(h, core.transpose(1, 2))
    return torch.einsum("nthk,nhlk->nthl", _by_heads(h, core), core).flatten(2)


def _by_heads(h: Tensor, heads: Tensor) -> Tensor:
    """h (rows, tokens, r) as (rows, tokens, h, k), by as many heads as the second dimension of `heads` has."""
    return h.reshape(*h.shape[:2], heads.shape[1], -1)


def _times_heads(h: Tensor, scales: Tensor) -> Tensor:
    return (_by_heads(h, scales) * scales[:, None, :, None]).flatten(2)


def _back(factors: Factors, g: Tensor, x: Tensor | None, h: Tensor, hs: Tensor) -> Tensor:
    """Write the gradients of the factors; return that of x A^T, (rows, tokens, r)."""
    gh = torch.bmm(g, factors.Bt.transpose(1, 2)) * factors.s
    if "B" in factors.trains:
        factors.write("B", torch.bmm(hs.transpose(1, 2), g))
    if factors.R is not None:
        gh = _back_through_the_core(factors, factors.R, gh, h)
    if x is not None:
        factors.write("A", torch.bmm(gh.transpose(1, 2), x))
    return gh


def _back_through_the_core(factors: Factors, core: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """Write the gradients of the core and of its heads' scales; return that of h from that of the core's output."""
    if factors.heads is not None:
        scales = factors.heads
        factors.write("S", (_by_heads(g, scales) * _by_heads(_times_core(h, core), scales)).sum((1, 3)))
        g = _times_heads(g, scales)
    if core.dim() == 3:
        if "R" in factors.trains:
            factors.write("R", torch.bmm(g.transpose(1, 2), h))
        return torch.bmm(g, core)
    if "R" in factors.trains:
        factors.write("R", torch.einsum("nthl,nthk->nhlk", _by_heads(g, core), _by_heads(h, core)))
    return torch.einsum("nthl,nhlk->nthk", _by_heads(g, core), core).flatten(2)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, _: Tensor, factors: Factors) -> Tensor:
        x = x.to(factors.A.dtype)
        h, hs = _inner(factors, x)
        ctx.factors = factors
        ctx.save_for_backward(x if "A" in factors.trains else None, h, hs)
        return y + torch.bmm(hs, factors.Bt).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, h, hs), factors = grads, ctx.saved_tensors, ctx.factors
        gh = _back(factors, g.to(factors.A.dtype), x, h, hs)
        gx = torch.bmm(gh, factors.A).to(g.dtype) if ctx.needs_input_grad[1] else None
        return g, gx, None, None


class _LinearWithProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor, factors: Factors) -> Tensor:
        h, hs = _inner(factors, x)
        ctx.factors = factors
        ctx.save_for_backward(x if "A" in factors.trains else None, h, hs, weight)
        return F.linear(x, weight, bias).baddbmm_(hs, factors.Bt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, h, hs, weight), factors = grads, ctx.saved_tensors, ctx.factors
        gh = _back(factors, g, x, h, hs)
        gx = (g @ weight).baddbmm_(gh, factors.A) if ctx.needs_input_grad[0] else None
        return gx, None, None, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor, write: Write) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.write, ctx.biased = write, bias is not None
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        ctx.write("weight", torch.bmm(g.transpose(1, 2), x))
        if ctx.biased:
            ctx.write("bias", g.sum(1))
        return torch.bmm(g, weight) if ctx.needs_input_grad[0] else None, None, None, None, None


class _RowAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor, write: Write) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.write, ctx.biased = write, bias is not None
        scaled = x * weight[:, None]
        return scaled if bias is None else scaled + bias[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        ctx.write("weight", (g * x).sum(1))
        if ctx.biased:
            ctx.write("bias", g.sum(1))
        return g * weight[:, None] if ctx.needs_input_grad[0] else None, None, None, None, None
