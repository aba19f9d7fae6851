"""LoRA adapters, and the few operations on them that federated algorithms are made of.

Convention, everywhere: A is (r, d_in), B is (d_out, r), and a module computes (W + s B A) x, with s the same for
every client and every rank, so that it never appears in an algorithm. Sums run in float32 or wider whatever the
factors' own type, small cores (R, R) in float64, and nothing of size (d_out, d_in) is built, except by `delta`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from math import copysign, inf, sqrt
from operator import add

import torch
from torch import Tensor

from .seeds import derive
from .svd import Product as Product
from .svd import at_least_float32 as at_least_float32
from .svd import row_signs
from .svd import svd as svd

Side = Mapping[str, Tensor]  # module name -> one matrix
SIDES = "ABRDH"


@dataclass(frozen=True, eq=False)
class LoRA:
    """An adapter: five sides, each with one matrix a module. A side that is not trained, or not sent, is empty."""

    A: Side = field(default_factory=dict)  # (r, d_in)
    B: Side = field(default_factory=dict)  # (d_out, r)
    H: Side = field(default_factory=dict)  # whatever else is trained, as a classifier's head
    R: Side = field(default_factory=dict)  # (r, r), a core: where there is one, the product is B R A; or its blocks
    # ^ on the diagonal alone, those of h heads: (h, k, k) with h k = r
    D: Side = field(default_factory=dict)  # (d_out, d_in), added: only in an offset that has outgrown factors

    def side(self, name: str) -> Side:
        """The side with this letter."""
        found: Side = getattr(self, name)
        return found

    def only(self, sides: str) -> "LoRA":
        """The adapter without all but the named sides: `only("BH")`."""
        return LoRA(**{s: self.side(s) for s in sides})

    def over(self, other: "LoRA") -> "LoRA":
        """The matrices of both adapters; where both have one, it is this adapter's."""
        return LoRA(**{s: {**other.side(s), **self.side(s)} for s in SIDES})

    def matrices(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield the letter of the side, the name of the module and the matrix, for every matrix in order."""
        for s in SIDES:
            for m, t in self.side(s).items():
                yield s, m, t

    def numel(self) -> int:
        """The count of numbers in all matrices."""
        return sum(t.numel() for _, _, t in self.matrices())

    def __bool__(self) -> bool:
        return any(self.side(s) for s in SIDES)


def from_matrices(matrices: Iterable[tuple[str, str, Tensor]]) -> LoRA:
    """The adapter with these matrices, each given with its side and its module, as `LoRA.matrices` yields them."""
    sides: dict[str, dict[str, Tensor]] = {s: {} for s in SIDES}
    for s, m, t in matrices:
        sides[s][m] = t
    return LoRA(**sides)


def map_factors(f: Callable[..., Tensor], first: LoRA, *others: LoRA) -> LoRA:
    """Apply `f` to every matrix of `first` and the matrices at the same side and module of the others.

    Raises `KeyError` where another adapter lacks a matrix of the first.
    """
    return from_matrices((s, m, f(t, *(x.side(s)[m] for x in others))) for s, m, t in first.matrices())


def difference(after: LoRA, before: LoRA) -> LoRA:
    """Every matrix of `after` minus the same matrix of `before`, in float64."""
    return map_factors(lambda x, y: x.double() - y.double(), after, before)


def euclidean_norm(lora: LoRA) -> float:
    """The norm of all the adapter's numbers as one vector; `norm` is that of its product."""
    return sqrt(sum(float(t.square().sum()) for _, _, t in lora.matrices()))


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = float(sum(weights))
    return [w / total for w in weights]


def average(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """The weighted mean, matrix by matrix, in float32 or wider; that of equal matrices is the same to the last bit."""
    p = normalised(weights)

    def mean(*terms: Tensor) -> Tensor:
        so_far, weight = at_least_float32(terms[0]).clone(), p[0]
        for c, term in zip(p[1:], terms[1:], strict=True):
            weight += c
            so_far.lerp_(
                at_least_float32(term), c / weight if weight else 0.0
            )  # a sum would change bits that all have alike
        return so_far

    return map_factors(mean, *loras)


def scale(lora: LoRA, c: float) -> LoRA:
    """The adapter whose product is c times as large; each factor takes sqrt|c|, which keeps them of like size."""
    root = abs(c) ** 0.5
    signed_root = copysign(root, c)
    return LoRA(
        A={m: root * at_least_float32(a) for m, a in lora.A.items()},
        B={m: signed_root * at_least_float32(b) for m, b in lora.B.items()},
        R=lora.R,
        D={m: c * at_least_float32(d) for m, d in lora.D.items()},
    )


def modules(*loras: LoRA) -> list[str]:
    """The names of the modules that at least one adapter has a product for, each once."""
    return list(dict.fromkeys(chain.from_iterable(map(_modules, loras))))


def _modules(lora: LoRA) -> list[str]:
    return [m for m in (*lora.A, *lora.D) if m in lora.B or m in lora.D]


def factored(lora: LoRA) -> LoRA:
    """The same product in two factors: a core is multiplied into B, a dense matrix is paired with an identity."""
    A, B = dict(lora.A), dict(lora.B)
    for m in modules(lora):
        B[m], A[m] = _pair(lora, m)
    return LoRA(A, B, lora.H)


def join(*loras: LoRA) -> LoRA:
    """The adapter whose product is the sum of the products; its rank is the sum of the ranks. Heads are dropped."""
    A, B = {}, {}
    for m in modules(*loras):
        B[m], A[m] = _beside([_pair(x, m) for x in _with_module(loras, m)])
    return LoRA(A, B)


def stack(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """The adapter whose product is exactly the weighted mean of the products (FLoRA, arXiv 2409.05976).

    Each factor of a client takes the square root of the client's weight, which keeps them of like size. One module is
    weighed and stacked at a time, so that the work takes no more memory than the result.
    """
    A, B = {}, {}
    roots = [p**0.5 for p in normalised(weights)]
    for m in modules(*loras):
        present = [(root, x) for root, x in zip(roots, loras, strict=True) if m in x.A or m in x.D]
        B[m], A[m] = _beside([_scaled(root, *_pair(x, m)) for root, x in present])
    return LoRA(A, B)


def _scaled(root: float, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of a module, each multiplied by `root`."""
    return root * at_least_float32(b), root * at_least_float32(a)


def residual(loras: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    """Mean of the products minus product of the means, at its smallest rank, (K - 1) r for K clients of rank r.

    With p the weights made to sum to one, that residual is sum_i p_i (B_i - B)(A_i - A) = sum_ij D_ij B_i A_j, where
    D = diag(p) - p p^T = Q diag(e) Q^T has rank K - 1. Means are taken off first: of two nearly equal products the
    difference would have no digits left.
    """
    p = torch.tensor(normalised(weights), dtype=torch.float64)
    e, Q = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))  # ascending; the first is zero
    e, Q = e[1:], Q[:, 1:]
    if not bool((e > 0).any()):
        return LoRA()
    mixing = (e[e > 0].sqrt() * Q[:, e > 0]).T  # (at most K - 1, K)

    def mix(own: Tensor) -> Tensor:
        """Subtract from the clients' matrices (..., K, n) their mean, and mix the rest to (..., K - 1, n)."""
        own -= torch.matmul(p.to(own), own).unsqueeze(-2)
        return torch.matmul(mixing.to(own), own)

    A, B = {}, {}
    for m, a in loras[0].A.items():
        A[m] = mix(torch.stack([at_least_float32(x.A[m]) for x in loras]).flatten(1)).view(
            -1, a.shape[1]
        )  # ((K - 1) r, d_in)
        B[m] = mix(torch.stack([at_least_float32(x.B[m]) for x in loras], 1)).flatten(1)  # (d_out, (K - 1) r)
    return LoRA(A, B)


def truncate(lora: LoRA, rank: int) -> LoRA:
    """The best rank-`rank` approximation of the product (Eckart-Young), with sqrt(S) in each factor."""
    A, B = {}, {}
    for m in modules(lora):
        u, s, vh = svd(*_pair(lora, m), rank)
        root = s.sqrt()
        B[m], A[m] = u * root, root[:, None] * vh
    return LoRA(A, B)


def truncate_by_energy(lora: LoRA, share: float, least: Mapping[str, int] | None = None) -> tuple[LoRA, float, float]:
    """The product with the fewest directions that hold a share of its energy, their mean number, and the share cut.

    Energy is the sum of the squared singular values of a module. Of a module in `least` at least so many directions are
    kept, if it has as many. Factors are as of `truncate`.
    """
    A, B, held, whole = {}, {}, 0.0, 0.0
    for m in modules(lora):
        product = Product(*_pair(lora, m))
        U, S, Vt = product.svd(energy=share * product.energy if share < 1 else inf)  # (d_out, q), (q,), (q, d_in)
        if least and len(S) < least[m]:
            U, S, Vt = product.svd(least[m])
        root = S.sqrt()
        B[m], A[m] = U * root, root[:, None] * Vt
        held, whole = held + float(S.double().square().sum()), whole + product.energy
    mean_rank = sum(a.shape[0] for a in A.values()) / len(A)
    return LoRA(A, B), mean_rank, max(0.0, 1 - held / whole) if whole and share < 1 else 0.0


def compact(lora: LoRA) -> LoRA:
    """The same product in two factors, with no module's rank above its smaller dimension; other modules are left."""
    two = factored(lora)
    A, B = dict(two.A), dict(two.B)
    for m in modules(lora):
        full_rank = min(B[m].shape[0], A[m].shape[1])
        if A[m].shape[0] > full_rank:
            smaller = truncate(LoRA({m: A[m]}, {m: B[m]}), full_rank)
            A[m], B[m] = smaller.A[m], smaller.B[m]
    return LoRA(A, B, lora.H)


def principal(lora: LoRA, rank: int) -> LoRA:
    """The best rank-`rank` approximation with orthonormal rows in A: B = U S, A = V^T, largest first.

    The first k rows of A and columns of B are the best rank-k approximation, for any k. Signs are fixed: the entry of
    a row of A that is largest in absolute value is positive.
    """
    return principal_part(lora, rank)[0]


def principal_part(lora: LoRA, rank: int) -> tuple[LoRA, float]:
    """What `principal` returns, and the energy of the whole product: the sum of its squared singular values."""
    A, B, energy = {}, {}, 0.0
    for m in modules(lora):
        product = Product(*_pair(lora, m))
        u, s, vh = product.svd(rank)
        sign = row_signs(vh)  # (rank, 1)
        B[m], A[m] = u * s * sign.T, sign * vh
        energy += product.energy
    return LoRA(A, B), energy


def orthonormal(lora: LoRA) -> LoRA:
    """The same product with orthonormal rows in A, whose span is that of A's rows before; the head is kept."""
    A, B = {}, {}
    for m, a in lora.A.items():
        q, t = torch.linalg.qr(at_least_float32(a).T)  # (d_in, r), (r, r)
        A[m], B[m] = q.T, at_least_float32(lora.B[m]) @ t.T
    return LoRA(A, B, lora.H)


def leading(lora: LoRA, rank: int) -> LoRA:
    """The first `rank` rows of A and columns of B; the head is kept."""
    return LoRA({m: a[:rank] for m, a in lora.A.items()}, {m: b[:, :rank] for m, b in lora.B.items()}, lora.H)


def split_rank(lora: LoRA, count: int) -> tuple[LoRA, LoRA]:
    """The adapter without its last `count` rows of A and columns of B, and these alone; other sides go with the first.

    A module of no higher rank than that has nothing left in the first.
    """
    if not count:
        return lora, LoRA()
    at = {m: max(0, len(a) - count) for m, a in lora.A.items()}
    at |= {m: max(0, b.shape[1] - count) for m, b in lora.B.items()}
    first = LoRA(
        A={m: a[: at[m]] for m, a in lora.A.items()}, B={m: b[:, : at[m]].contiguous() for m, b in lora.B.items()}
    )
    last = LoRA(
        A={m: a[at[m] :] for m, a in lora.A.items()}, B={m: b[:, at[m] :].contiguous() for m, b in lora.B.items()}
    )
    return first.over(lora.only("RDH")), last


def append_rank(lora: LoRA, rows: LoRA) -> LoRA:
    """The adapter with these rows of A and columns of B behind its own, where there are any: `split_rank` undone."""
    A = {m: torch.cat([lora.A[m], a.to(lora.A[m].dtype)]) for m, a in rows.A.items()}
    B = {m: torch.cat([lora.B[m], b.to(lora.B[m].dtype)], 1) for m, b in rows.B.items()}
    return LoRA(A, B).over(lora)


def reinitialise(lora: LoRA, seed: str) -> LoRA:
    """A new start of the same shape: A drawn as by PEFT, uniform within 1/sqrt(d_in), B zero; the head is kept."""
    A = {}
    for m, a in lora.A.items():
        generator = torch.Generator().manual_seed(derive(seed, m))
        A[m] = torch.empty(a.shape).uniform_(-1, 1, generator=generator).to(a.dtype) / a.shape[1] ** 0.5
    return LoRA(A, {m: torch.zeros_like(b) for m, b in lora.B.items()}, lora.H)


def framed(lora: LoRA, seed: str) -> LoRA:
    """The same product with a core R between frames: A's rows and B's columns are orthonormal; the head is kept.

    A spans what the given one spans, and so does B where the given one is not zero; where it is, B is drawn.
    """
    turned = LoRA({m: b.T for m, b in lora.B.items()}, {m: a.T for m, a in lora.A.items()})
    drawn = reinitialise(turned, seed).A  # (r, d_out)
    A, B, R = {}, {}, {}
    for m, a in lora.A.items():
        q_a, t_a = torch.linalg.qr(at_least_float32(a).T)  # (d_in, r), (r, r)
        given = bool(lora.B[m].any())
        q_b, t_b = torch.linalg.qr(at_least_float32(lora.B[m] if given else drawn[m].T))  # (d_out, r), (r, r)
        core = t_b @ t_a.T
        A[m], B[m], R[m] = q_a.T, q_b, core if given else torch.zeros_like(core)
    return LoRA(A, B, lora.H, R)


def densify(parts: Sequence[LoRA]) -> tuple[LoRA, ...]:
    """Bound the size of an offset, whose product is the sum of its parts' products.

    While its low-rank parts together hold fewer numbers than one dense matrix per module, return them unchanged:
    clients already hold them by their hashes. Beyond that, return their sum as a single dense part. So an offset never
    holds more than twice the numbers of the adapted weights.
    """
    parts = tuple(p for p in parts if p.A or p.D)
    if _is_smaller_than_dense([p for p in parts if not p.D]):
        return parts
    return (LoRA(D={m: reduce(add, _products(parts, m)) for m in modules(*parts)}),)


def _is_smaller_than_dense(parts: Sequence[LoRA]) -> bool:
    """Do the factors of all parts have no more numbers than one dense matrix for each module?"""
    dense: dict[str, int] = {}
    for part in parts:
        dense |= {m: part.B[m].shape[0] * a.shape[1] for m, a in part.A.items()}
    return sum(part.only("AB").numel() for part in parts) <= sum(dense.values())


def _products(loras: Sequence[LoRA], m: str) -> list[Tensor]:
    """The product of module m in every adapter that has it: (d_out, d_in) each."""
    return [_dense(x, m) for x in _with_module(loras, m)]


def norm(lora: LoRA) -> float:
    """Frobenius norm of the product over all modules; by thin QRs, so that small differences keep their digits."""
    return sqrt(sum(_squared_norm(*_pair(lora, m)) for m in modules(lora)))


def _squared_norm(b: Tensor, a: Tensor) -> float:
    rb = torch.linalg.qr(b.double(), mode="r")[1]
    ra = torch.linalg.qr(a.T.double(), mode="r")[1]
    return float((rb @ ra.T).square().sum())


def inner(x: LoRA, y: LoRA) -> float:
    """Frobenius inner product of the two products, summed over modules: tr((B_x A_x)^T B_y A_y)."""
    of_y = set(modules(y))
    return sum(_inner_product(_pair(x, m), _pair(y, m)) for m in modules(x) if m in of_y)


def _inner_product(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> float:
    (bx, ax), (by, ay) = x, y
    return float(
        ((at_least_float32(bx).T @ at_least_float32(by)) * (at_least_float32(ax) @ at_least_float32(ay).T))
        .double()
        .sum()
    )


def delta(lora: LoRA) -> Side:
    """The product of every module as a dense matrix (d_out, d_in), for tests, small models and offsets of high rank."""
    return {m: _dense(lora, m) for m in modules(lora)}


def _with_module(loras: Sequence[LoRA], m: str) -> list[LoRA]:
    """The adapters that have module m."""
    return [x for x in loras if m in x.A or m in x.D]


def _dense(lora: LoRA, m: str) -> Tensor:
    """The product of one module: (d_out, d_in)."""
    if m not in lora.A:
        return lora.D[m]
    b, a = _pair(LoRA(lora.A, lora.B, R=lora.R), m)
    product = at_least_float32(b) @ at_least_float32(a)
    return lora.D[m] + product if m in lora.D else product


def _pair(lora: LoRA, m: str) -> tuple[Tensor, Tensor]:
    """Two factors of one module's product: (d_out, k), (k, d_in)."""
    pairs = []
    if m in lora.A:
        pairs.append((_times_core(lora.B[m], lora.R[m]) if m in lora.R else lora.B[m], lora.A[m]))
    if m in lora.D:
        d = lora.D[m]
        eye = torch.eye(min(d.shape), dtype=d.dtype)
        pairs.append((d, eye) if d.shape[1] <= d.shape[0] else (eye, d))
    return _beside(pairs)


def _times_core(b: Tensor, core: Tensor) -> Tensor:
    """B R, (d_out, r); of a core in blocks each head's columns of B are multiplied by that head's block."""
    b, core = at_least_float32(b), at_least_float32(core)
    if core.dim() == 2:
        return b @ core
    return torch.einsum("ohk,hkl->ohl", b.reshape(len(b), *core.shape[:2]), core).flatten(1)


def _beside(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair of factors whose product is the sum of the products."""
    return pairs[0] if len(pairs) == 1 else (torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs]))


# The names of version 0.1, which strategies of others may use for one release more.
settle = densify
contrast = residual
redraw = reinitialise
shares = normalised
wide = at_least_float32
