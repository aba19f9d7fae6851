"""LoRA adapters, and the few operations on them that federated algorithms are made of.

Convention, everywhere: A is (r, d_in), B is (d_out, r), and a module computes (W + s B A) x, with s the same for
every client and every rank, so that it never appears in an algorithm. Sums run in float32 or wider whatever the
factors' own type, small cores (R, R) in float64, and nothing of size (d_out, d_in) is built, except by `delta`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Side = Mapping[str, Tensor]  # module name -> one matrix
SIDES = "ABH"


@dataclass(frozen=True, eq=False)
class LoRA:
    """An adapter by sides; a side that is not trained, or not sent, is empty."""

    A: Side = field(default_factory=dict)  # (r, d_in)
    B: Side = field(default_factory=dict)  # (d_out, r)
    H: Side = field(default_factory=dict)  # whatever else is trained, as a classifier's head

    def side(self, name: str) -> Side:
        """One side by its letter."""
        found: Side = getattr(self, name)
        return found

    def only(self, sides: str) -> "LoRA":
        """Drop all but the named sides: `only("BH")`."""
        return LoRA(**{s: self.side(s) for s in sides})

    def over(self, other: "LoRA") -> "LoRA":
        """This adapter where it has a matrix, `other` where it has not."""
        return LoRA(**{s: {**other.side(s), **self.side(s)} for s in SIDES})

    def __bool__(self) -> bool:
        return any(self.side(s) for s in SIDES)


def wide(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def shares(weights: Sequence[float]) -> list[float]:
    """Weights made to sum to one."""
    total = float(sum(weights))
    return [w / total for w in weights]


def average(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """Weighted mean, matrix by matrix, in float32 or wider."""
    p = shares(weights)

    def mean(sides: list[Side]) -> Side:
        return {m: _sum([c * wide(side[m]) for c, side in zip(p, sides, strict=True)]) for m in sides[0]}

    return LoRA(**{s: mean([x.side(s) for x in loras]) for s in SIDES})


def scale(lora: LoRA, c: float) -> LoRA:
    """The adapter whose product is c B A; |c| goes half to each factor, which keeps them of like size."""
    root = abs(c) ** 0.5
    return LoRA(
        A={m: root * wide(a) for m, a in lora.A.items()},
        B={m: (root if c >= 0 else -root) * wide(b) for m, b in lora.B.items()},
    )


def join(*loras: LoRA) -> LoRA:
    """The adapter whose product is the sum of the products; its rank is the sum of the ranks. Heads are dropped."""
    some = [x for x in loras if x.A]
    modules = some[0].A if some else {}
    return LoRA(
        A={m: torch.cat([x.A[m] for x in some]) for m in modules},
        B={m: torch.cat([x.B[m] for x in some], 1) for m in modules},
    )


def stack(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """The adapter whose product is exactly the weighted mean of the products (FLoRA, arXiv 2409.05976)."""
    return join(*[scale(x, p) for x, p in zip(loras, shares(weights), strict=True)])


def contrast(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """Mean of the products minus product of the means, at its smallest rank, (K - 1) r for K clients of rank r.

    With p the weights made to sum to one, that residual is sum_i p_i (B_i - B)(A_i - A) = sum_ij D_ij B_i A_j, where
    D = diag(p) - p p^T = Q diag(e) Q^T has rank K - 1. Means are taken off first: of two nearly equal products the
    difference would have no digits left.
    """
    p = torch.tensor(shares(weights), dtype=torch.float64)
    e, Q = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))  # ascending; the first is zero
    mean = average(loras, weights)

    def mix(side: str, m: str, j: int) -> Tensor:
        centre = mean.side(side)[m]
        return _sum([float(e[j].sqrt() * Q[i, j]) * (wide(x.side(side)[m]) - centre) for i, x in enumerate(loras)])

    kept = [j for j in range(1, len(loras)) if e[j] > 0]
    if not kept:
        return LoRA()
    return LoRA(
        A={m: torch.cat([mix("A", m, j) for j in kept]) for m in mean.A},
        B={m: torch.cat([mix("B", m, j) for j in kept], 1) for m in mean.B},
    )


def svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of B A from two thin QRs and a core in float64: (d_out, k), (k,), (k, d_in)."""
    qb, rb = torch.linalg.qr(wide(B))
    qa, ra = torch.linalg.qr(wide(A).T)
    u, s, vh = torch.linalg.svd(rb.double() @ ra.double().T, full_matrices=False)
    return qb @ u.to(qb.dtype), s.to(qb.dtype), vh.to(qa.dtype) @ qa.T


def truncate(lora: LoRA, rank: int) -> LoRA:
    """The best rank-`rank` approximation of B A (Eckart-Young), each factor with half of the singular values."""
    A, B = {}, {}
    for m in lora.A:
        u, s, vh = svd(lora.B[m], lora.A[m])
        root = s[:rank].sqrt()
        B[m], A[m] = u[:, :rank] * root, root[:, None] * vh[:rank]
    return LoRA(A, B)


def compact(lora: LoRA) -> LoRA:
    """The same product, with no module's rank above its smaller dimension; other modules are left as they are."""
    A, B = dict(lora.A), dict(lora.B)
    for m in lora.A:
        full = min(B[m].shape[0], A[m].shape[1])
        if A[m].shape[0] > full:
            small = truncate(LoRA({m: A[m]}, {m: B[m]}), full)
            A[m], B[m] = small.A[m], small.B[m]
    return LoRA(A, B, lora.H)


def inner(x: LoRA, y: LoRA) -> float:
    """Frobenius inner product of the two products, summed over modules: tr((B_x A_x)^T B_y A_y)."""

    def one(m: str) -> float:
        return float(((wide(x.B[m]).T @ wide(y.B[m])) * (wide(x.A[m]) @ wide(y.A[m]).T)).double().sum())

    return sum(one(m) for m in x.A if m in y.A)


def delta(lora: LoRA) -> Side:
    """B A for every module: (d_out, d_in). For tests and small models."""
    return {m: lora.B[m] @ lora.A[m] for m in lora.A}


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
