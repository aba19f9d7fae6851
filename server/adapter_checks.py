"""Checks of what a strategy returns, before it reaches the clients: shapes that they can load, and finite numbers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora import LoRA
from fedlora.strategy import Strategy


def validate_adapter(strategy: Strategy[Any], state: Any, like: LoRA, t: int) -> LoRA:
    """The adapter of a state. Raises `StrategyError`, naming the matrix, where no client could load the adapter."""
    adapter = strategy.adapter(state)
    for misfit in misfits(adapter, like):
        raise StrategyError(f"round {t + 1}: strategy {type(strategy).__name__} returned {misfit}")
    for _, module, matrix in adapter.matrices():
        if not bool(torch.isfinite(matrix).all()):
            raise StrategyError(f"round {t + 1}: the new adapter is not finite at {module}; a lower train.lr may help")
    return adapter


def misfits(adapter: LoRA, like: LoRA) -> Iterator[str]:
    """Yield every matrix of an adapter that does not fit the modules of `like`, and what fits them, in words."""
    yield from _misfit_factors(adapter, like)
    for m, h in like.H.items():
        head = adapter.H.get(m)
        if head is None or head.shape != h.shape:
            yield f"{'nothing' if head is None else tuple(head.shape)} for {m}; it takes {tuple(h.shape)}"


def _misfit_factors(adapter: LoRA, like: LoRA) -> Iterator[str]:
    for m in like.A:
        a, b = adapter.A.get(m), adapter.B.get(m)
        if a is None or b is None:
            yield f"no {'A' if a is None else 'B'} for {m}"
        elif not _fits(a, b, like.A[m], like.B[m]):
            takes = _factors_of(a.dim(), d_in=like.A[m].shape[-1], d_out=like.B[m].shape[0])
            yield f"A {tuple(a.shape)} and B {tuple(b.shape)} for {m}; it takes {takes}"


def _factors_of(dimensions: int, *, d_in: int, d_out: int) -> str:
    """The shapes of A and B that a module of this size takes, in words: matrices, or VeRA's vectors."""
    if dimensions > 1:
        return f"A (r, {d_in}) and B ({d_out}, r)"
    return f"A ({d_in},) and B ({d_out},)"


def _fits(a: Tensor, b: Tensor, like_a: Tensor, like_b: Tensor) -> bool:
    """Are these two factors of one rank, or two vectors (VeRA), for a module of this shape?"""
    if like_a.dim() == 1:
        return a.shape == like_a.shape and b.shape == like_b.shape
    if not a.dim() == b.dim() == 2:
        return False
    (rank, d_in), (d_out, rank_b) = a.shape, b.shape
    return rank == rank_b and d_in == like_a.shape[1] and d_out == like_b.shape[0]
