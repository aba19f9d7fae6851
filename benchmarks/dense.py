"""The server's steps on dense matrices (d, d), for comparison with those in factors: one function a strategy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.uploads import D, Module
from fedlora.lora import LoRA
from fedlora.strategies.florist import FLoRIST
from fedlora.strategies.lora_fair import LoRAFair


def mean_of_products(x: Module) -> Tensor:
    W = x.start.new_zeros(D, D)
    for p, a, b in zip(x.p, x.A, x.B, strict=True):
        W.addmm_(b, a, alpha=p)
    return W


def mean(p: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for c, t in zip(p, terms, strict=True):
        total.add_(t, alpha=c)
    return total


def residual(x: Module) -> Tensor:
    return mean_of_products(x) - mean(x.p, x.B) @ mean(x.p, x.A)


def cut(W: Tensor, rank: int = 0, share: float = 1.0) -> LoRA:
    """The leading singular triplets: so many, or the fewest that hold a share of the sum of squares."""
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    held = s.double().square().cumsum(0)
    k = rank or int((held < share * held[-1]).sum()) + 1
    return LoRA({"": s[:k, None] * vh[:k]}, {"": u[:, :k]})


def flora(x: Module, _: Any) -> LoRA:
    return LoRA(D={"": mean_of_products(x)})


def fedex(x: Module, _: Any) -> LoRA:
    return LoRA(D={"": residual(x)})


def fedex_in_factors(x: Module, _: Any) -> LoRA:
    return cut(residual(x), (len(x.p) - 1) * len(x.start))


def fedex_truncated(x: Module, _: Any) -> LoRA:
    return cut(residual(x), len(x.start))


def flexlora(x: Module, _: Any) -> LoRA:
    return cut(mean_of_products(x), len(x.start))


def florist(x: Module, strategy: FLoRIST) -> LoRA:
    return cut(mean_of_products(x), share=strategy.energy)


def fedsvd(x: Module, _: Any) -> LoRA:
    return cut(mean(x.p, x.B) @ x.start, len(x.start))


def fair(x: Module, strategy: LoRAFair) -> LoRA:
    """min |W - (B + dB) A|^2 + lam |dB|^2, as least squares with rows added for the penalty."""
    A, B = mean(x.p, x.A), mean(x.p, x.B)
    r = len(A)
    basis = torch.cat([A, strategy.lam**0.5 * torch.eye(r, dtype=A.dtype)], 1)  # (r, d + r)
    missed = torch.cat([mean_of_products(x) - B @ A, A.new_zeros(D, r)], 1)  # (d, d + r)
    return LoRA({"": A}, {"": B + torch.linalg.lstsq(basis.T, missed.T).solution.T})


def fair_cosine(x: Module, strategy: LoRAFair) -> LoRA:
    """The strategy's own descent, with the product and the gradient of the cosine written out at every step."""
    A, B, W = mean(x.p, x.A), mean(x.p, x.B), mean_of_products(x)
    size, unit, dB = W.norm(), (B @ A).norm() ** 2, torch.zeros_like(B)
    step = strategy.lr / torch.linalg.matrix_norm(A, 2) ** 2
    for _ in range(strategy.steps):
        now = (B + dB) @ A
        slope = (W - (W * now).sum() / now.norm() ** 2 * now) / (size * now.norm()) @ A.T
        dB = (dB + step * unit * slope) / (1 + 2 * step * strategy.lam)
    now = (B + dB) @ A
    return LoRA({"": A}, {"": (B + dB) * (W * now).sum() / now.norm() ** 2})
