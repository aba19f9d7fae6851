"""LoRA adapters, and the few operations on them that federated algorithms are made of.

Convention, everywhere: A is (r, d_in), B is (d_out, r), and a module computes (W + s B A) x, with s the same for
every client and every rank, so that it never appears in an algorithm. Sums run in float32 or wider whatever the
factors' own type, small cores (R, R) in float64, and nothing of size (d_out, d_in) is built, except by `delta`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

Side = Mapping[str, Tensor]  # module name -> one matrix
SIDES = "ABRDH"


@dataclass(frozen=True, eq=False)
class LoRA:
    """An adapter by sides; a side that is not trained, or not sent, is empty."""

    A: Side = field(default_factory=dict)  # (r, d_in)
    B: Side = field(default_factory=dict)  # (d_out, r)
    H: Side = field(default_factory=dict)  # whatever else is trained, as a classifier's head
    R: Side = field(default_factory=dict)  # (r, r), a core: where there is one, the product is B R A
    D: Side = field(default_factory=dict)  # (d_out, d_in), added to the product: only in an offset that has outgrown factors

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
    """The adapter whose product is c times this one's; sqrt|c| goes to each factor, which keeps them of like size."""
    root = abs(c) ** 0.5
    return LoRA(
        A={m: root * wide(a) for m, a in lora.A.items()},
        B={m: (root if c >= 0 else -root) * wide(b) for m, b in lora.B.items()},
        R=lora.R,
        D={m: c * wide(d) for m, d in lora.D.items()},
    )


def factored(lora: LoRA) -> LoRA:
    """The same product in two factors: a core goes into B, a dense matrix stands beside an identity."""
    A, B = dict(lora.A), dict(lora.B)
    for m, core in lora.R.items():
        B[m] = wide(B[m]) @ wide(core)
    for m, d in lora.D.items():
        eye = torch.eye(min(d.shape), dtype=d.dtype)
        b, a = (d, eye) if d.shape[1] <= d.shape[0] else (eye, d)
        A[m], B[m] = (torch.cat([A[m], a]), torch.cat([B[m], b], 1)) if m in A else (a, b)
    return LoRA(A, B, lora.H)


def join(*loras: LoRA) -> LoRA:
    """The adapter whose product is the sum of the products; its rank is the sum of the ranks. Heads are dropped."""
    some = [factored(x) for x in loras]
    modules = dict.fromkeys(m for x in some for m in x.A)
    return LoRA(
        A={m: torch.cat([x.A[m] for x in some if m in x.A]) for m in modules},
        B={m: torch.cat([x.B[m] for x in some if m in x.B], 1) for m in modules},
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
    kept = [j for j in range(1, len(loras)) if e[j] > 0]
    if not kept:
        return LoRA()
    mixing = (e[kept].sqrt() * Q[:, kept]).T  # (K - 1, K)

    def mix(side: str, m: str) -> Tensor:
        own = torch.stack([wide(x.side(side)[m]) for x in loras])  # (K, ...)
        own -= torch.tensordot(p.to(own), own, 1)
        return torch.tensordot(mixing.to(own), own, 1)  # (K - 1, ...)

    return LoRA(
        A={m: mix("A", m).flatten(0, 1) for m in loras[0].A},
        B={m: mix("B", m).transpose(0, 1).flatten(1) for m in loras[0].B},
    )


def svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of B A from two thin QRs and a core in float64: (d_out, k), (k,), (k, d_in)."""
    qb, rb = torch.linalg.qr(wide(B))
    qa, ra = torch.linalg.qr(wide(A).T)
    u, s, vh = torch.linalg.svd(rb.double() @ ra.double().T, full_matrices=False)
    return qb @ u.to(qb.dtype), s.to(qb.dtype), vh.to(qa.dtype) @ qa.T


def truncate(lora: LoRA, rank: int) -> LoRA:
    """The best rank-`rank` approximation of the product (Eckart-Young), each factor with half of the singular values."""
    A, B = {}, {}
    lora = factored(lora)
    for m in lora.A:
        u, s, vh = svd(lora.B[m], lora.A[m])
        root = s[:rank].sqrt()
        B[m], A[m] = u[:, :rank] * root, root[:, None] * vh[:rank]
    return LoRA(A, B)


def compact(lora: LoRA) -> LoRA:
    """The same product in two factors, with no module's rank above its smaller dimension; other modules are left."""
    lora = factored(lora)
    A, B = dict(lora.A), dict(lora.B)
    for m in lora.A:
        full = min(B[m].shape[0], A[m].shape[1])
        if A[m].shape[0] > full:
            small = truncate(LoRA({m: A[m]}, {m: B[m]}), full)
            A[m], B[m] = small.A[m], small.B[m]
    return LoRA(A, B, lora.H)


def principal(lora: LoRA, rank: int) -> LoRA:
    """The best rank-`rank` approximation with orthonormal rows in A: B = U S, A = V^T, largest first.

    The first k rows of A and columns of B are the best rank-k approximation, for any k. Signs are fixed: the entry of
    a row of A that is largest in absolute value is positive.
    """
    A, B = {}, {}
    lora = factored(lora)
    for m in lora.A:
        u, s, vh = svd(lora.B[m], lora.A[m])
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        sign = torch.where(vh.gather(1, vh.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(vh.dtype)  # (rank, 1)
        B[m], A[m] = u * s * sign.T, sign * vh
    return LoRA(A, B)


def orthonormal(lora: LoRA) -> LoRA:
    """The same product with orthonormal rows in A, which span what they spanned; the head is kept."""
    A, B = {}, {}
    for m, a in lora.A.items():
        q, t = torch.linalg.qr(wide(a).T)  # (d_in, r), (r, r)
        A[m], B[m] = q.T, wide(lora.B[m]) @ t.T
    return LoRA(A, B, lora.H)


def leading(lora: LoRA, rank: int) -> LoRA:
    """The first `rank` rows of A and columns of B; the head is kept."""
    return LoRA({m: a[:rank] for m, a in lora.A.items()}, {m: b[:, :rank] for m, b in lora.B.items()}, lora.H)


def redraw(lora: LoRA, seed: str) -> LoRA:
    """A start of the same shape: A drawn anew as PEFT draws it, uniform within 1/sqrt(d_in), and B zero; the head is kept."""
    A = {}
    for m, a in lora.A.items():
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(f"{seed}/{m}".encode()).digest()[:8]) >> 1)
        A[m] = torch.empty(a.shape).uniform_(-1, 1, generator=generator).to(a.dtype) / a.shape[1] ** 0.5
    return LoRA(A, {m: torch.zeros_like(b) for m, b in lora.B.items()}, lora.H)


def settle(parts: Sequence[LoRA]) -> tuple[LoRA, ...]:
    """The parts as they are while their factors are smaller than dense matrices; from then on as one dense part.

    So old parts keep their content, and with it the name under which clients hold them already, and what is held never
    grows past twice the adapted weights.
    """
    some = tuple(p for p in parts if p.A or p.D)
    factors = [p for p in some if not p.D]
    held = sum(t.numel() for p in factors for s in "AB" for t in p.side(s).values())
    modules = dict.fromkeys(m for p in factors for m in p.A)
    shapes = {m: next((p.B[m].shape[0], p.A[m].shape[1]) for p in factors if m in p.A) for m in modules}
    if held <= sum(d_out * d_in for d_out, d_in in shapes.values()):
        return some
    whole: dict[str, Tensor] = {}
    for part in some:
        whole |= {m: whole[m] + d if m in whole else d for m, d in delta(part).items()}
    return (LoRA(D=whole),)


def norm(lora: LoRA) -> float:
    """Frobenius norm of the product over all modules, from two thin QRs, so that small differences keep their digits."""

    def one(b: Tensor, a: Tensor) -> float:
        rb, ra = (torch.linalg.qr(x.double(), mode="r")[1] for x in (b, a.T))
        return float((rb @ ra.T).square().sum())

    lora = factored(lora)
    return float(sum(one(lora.B[m], a) for m, a in lora.A.items())) ** 0.5


def inner(x: LoRA, y: LoRA) -> float:
    """Frobenius inner product of the two products, summed over modules: tr((B_x A_x)^T B_y A_y)."""
    x, y = factored(x), factored(y)

    def one(m: str) -> float:
        return float(((wide(x.B[m]).T @ wide(y.B[m])) * (wide(x.A[m]) @ wide(y.A[m]).T)).double().sum())

    return sum(one(m) for m in x.A if m in y.A)


def delta(lora: LoRA) -> Side:
    """The product for every module: (d_out, d_in). For tests, small models and offsets that are smaller so."""
    low = factored(LoRA(lora.A, lora.B, R=lora.R))
    product = {m: wide(low.B[m]) @ wide(low.A[m]) for m in low.A}
    return product | {m: d + product[m] if m in product else d for m, d in lora.D.items()}


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
