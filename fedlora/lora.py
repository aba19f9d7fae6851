"""LoRA adapters, and the few operations on them that federated algorithms are made of.

Convention, everywhere: A is (r, d_in), B is (d_out, r), and a module computes (W + s B A) x, with s the same for
every client and every rank, so that it never appears in an algorithm. Sums run in float32 or wider whatever the
factors' own type, small cores (R, R) in float64, and nothing of size (d_out, d_in) is built, except by `delta`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import sha256
from math import sqrt
from operator import add

import torch
from torch import Tensor

from .svd import svd as svd
from .svd import wide as wide

Side = Mapping[str, Tensor]  # module name -> one matrix
SIDES = "ABRDH"


@dataclass(frozen=True, eq=False)
class LoRA:
    """An adapter by sides; a side that is not trained, or not sent, is empty."""

    A: Side = field(default_factory=dict)  # (r, d_in)
    B: Side = field(default_factory=dict)  # (d_out, r)
    H: Side = field(default_factory=dict)  # whatever else is trained, as a classifier's head
    R: Side = field(default_factory=dict)  # (r, r), a core: where there is one, the product is B R A
    D: Side = field(default_factory=dict)  # (d_out, d_in), added: only in an offset that has outgrown factors

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


def shares(weights: Sequence[float]) -> list[float]:
    """Weights made to sum to one."""
    total = float(sum(weights))
    return [w / total for w in weights]


def average(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """Weighted mean, matrix by matrix, in float32 or wider; of equal matrices it is that matrix to the last bit."""
    p = shares(weights)

    def mean(terms: list[Tensor]) -> Tensor:
        so_far, seen = wide(terms[0]).clone(), p[0]
        for c, term in zip(p[1:], terms[1:], strict=True):
            seen += c
            so_far.lerp_(wide(term), c / seen if seen else 0.0)  # so that what nobody trained keeps its bits
        return so_far

    return LoRA(**{s: {m: mean([x.side(s)[m] for x in loras]) for m in loras[0].side(s)} for s in SIDES})


def scale(lora: LoRA, c: float) -> LoRA:
    """The adapter whose product is c times this one's; sqrt|c| goes to each factor, which keeps them of like size."""
    root = abs(c) ** 0.5
    return LoRA(
        A={m: root * wide(a) for m, a in lora.A.items()},
        B={m: (root if c >= 0 else -root) * wide(b) for m, b in lora.B.items()},
        R=lora.R,
        D={m: c * wide(d) for m, d in lora.D.items()},
    )


def modules(*loras: LoRA) -> list[str]:
    """The modules that any of them has a product for."""
    return list(dict.fromkeys(m for x in loras for m in (*x.A, *x.D) if m in x.B or m in x.D))


def factored(lora: LoRA) -> LoRA:
    """The same product in two factors: a core goes into B, a dense matrix stands beside an identity."""
    A, B = dict(lora.A), dict(lora.B)
    for m in modules(lora):
        B[m], A[m] = _pair(lora, m)
    return LoRA(A, B, lora.H)


def join(*loras: LoRA) -> LoRA:
    """The adapter whose product is the sum of the products; its rank is the sum of the ranks. Heads are dropped."""
    A, B = {}, {}
    for m in modules(*loras):
        B[m], A[m] = _beside([_pair(x, m) for x in loras if m in x.A or m in x.D])
    return LoRA(A, B)


def stack(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """The adapter whose product is exactly the weighted mean of the products (FLoRA, arXiv 2409.05976).

    The square root of a client's weight goes to each of its factors, which keeps them of like size.
    """
    A, B = {}, {}
    some = [(p**0.5, x) for p, x in zip(shares(weights), loras, strict=True)]
    for m in modules(*loras):
        pairs = [(root, _pair(x, m)) for root, x in some if m in x.A or m in x.D]
        B[m], A[m] = _beside([(root * wide(b), root * wide(a)) for root, (b, a) in pairs])
    return LoRA(A, B)


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

    def mix(own: Tensor) -> Tensor:
        """The clients' matrices (..., K, n), each less their mean, in K - 1 mixtures (..., K - 1, n)."""
        own -= torch.matmul(p.to(own), own).unsqueeze(-2)
        return torch.matmul(mixing.to(own), own)

    A, B = {}, {}
    for m, a in loras[0].A.items():
        A[m] = mix(torch.stack([wide(x.A[m]) for x in loras]).flatten(1)).view(-1, a.shape[1])  # ((K - 1) r, d_in)
        B[m] = mix(torch.stack([wide(x.B[m]) for x in loras], 1)).flatten(1)  # (d_out, (K - 1) r)
    return LoRA(A, B)


def truncate(lora: LoRA, rank: int) -> LoRA:
    """The best rank-`rank` approximation of the product (Eckart-Young), with sqrt(S) in each factor."""
    A, B = {}, {}
    for m in modules(lora):
        u, s, vh = svd(*_pair(lora, m), rank)
        root = s.sqrt()
        B[m], A[m] = u * root, root[:, None] * vh
    return LoRA(A, B)


def compact(lora: LoRA) -> LoRA:
    """The same product in two factors, with no module's rank above its smaller dimension; other modules are left."""
    A, B = dict(lora.A), dict(lora.B)
    for m in modules(lora):
        B[m], A[m] = _pair(lora, m)
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
    for m in modules(lora):
        u, s, vh = svd(*_pair(lora, m), rank)
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
    """A start of the same shape: A anew as PEFT draws it, uniform within 1/sqrt(d_in), B zero; the head is kept."""
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
    shapes = {m: (p.B[m].shape[0], a.shape[1]) for p in factors for m, a in p.A.items()}
    if held <= sum(d_out * d_in for d_out, d_in in shapes.values()):
        return some
    return (LoRA(D={m: reduce(add, (_dense(p, m) for p in some if m in p.A or m in p.D)) for m in modules(*some)}),)


def norm(lora: LoRA) -> float:
    """Frobenius norm of the product over all modules; by thin QRs, so that small differences keep their digits."""

    def one(b: Tensor, a: Tensor) -> float:
        rb, ra = (torch.linalg.qr(x.double(), mode="r")[1] for x in (b, a.T))
        return float((rb @ ra.T).square().sum())

    return sqrt(sum(one(*_pair(lora, m)) for m in modules(lora)))


def inner(x: LoRA, y: LoRA) -> float:
    """Frobenius inner product of the two products, summed over modules: tr((B_x A_x)^T B_y A_y)."""

    def one(bx: Tensor, ax: Tensor, by: Tensor, ay: Tensor) -> float:
        return float(((wide(bx).T @ wide(by)) * (wide(ax) @ wide(ay).T)).double().sum())

    both = set(modules(x)) & set(modules(y))
    return sum(one(*_pair(x, m), *_pair(y, m)) for m in modules(x) if m in both)


def delta(lora: LoRA) -> Side:
    """The product for every module: (d_out, d_in). For tests, small models and offsets that are smaller so."""
    return {m: _dense(lora, m) for m in modules(lora)}


def _dense(lora: LoRA, m: str) -> Tensor:
    if m not in lora.A:
        return lora.D[m]
    b, a = _pair(LoRA(lora.A, lora.B, R=lora.R), m)
    product = wide(b) @ wide(a)
    return lora.D[m] + product if m in lora.D else product


def _pair(lora: LoRA, m: str) -> tuple[Tensor, Tensor]:
    """Two factors of one module's product: (d_out, k), (k, d_in)."""
    pairs = []
    if m in lora.A:
        pairs.append((wide(lora.B[m]) @ wide(lora.R[m]) if m in lora.R else lora.B[m], lora.A[m]))
    if m in lora.D:
        d = lora.D[m]
        eye = torch.eye(min(d.shape), dtype=d.dtype)
        pairs.append((d, eye) if d.shape[1] <= d.shape[0] else (eye, d))
    return _beside(pairs)


def _beside(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair of factors whose product is the sum of the products."""
    return pairs[0] if len(pairs) == 1 else (torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs]))
