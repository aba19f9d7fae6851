"""Singular values of a product of two thin factors, which is never built."""

from dataclasses import dataclass
from functools import cached_property
from math import inf

import scipy.linalg
import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]
SLOWEST = 0.8  # how large a share of a singular value the one at twice its place may have for an iteration to be tried


def at_least_float32(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def row_signs(A: Tensor) -> Tensor:
    """The sign of each row's entry of largest absolute value, by which that entry becomes positive: (r, 1)."""
    largest = A.gather(1, A.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(A)


@dataclass(frozen=True, eq=False)
class Product:
    """A product B A of two thin factors, (d_out, R) and (R, d_in), in float32 or wider."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "B", at_least_float32(self.B))
        object.__setattr__(self, "A", at_least_float32(self.A))

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """B^T B and A A^T, (R, R) each."""
        return _gram(self.B.T), _gram(self.A)

    @property
    def energy(self) -> float:
        """The sum of all squared singular values, which is the square of the Frobenius norm."""
        of_b, of_a = self.grams
        return float((of_b.double() * of_a).sum())

    def svd(self, rank: int | None = None, energy: float = inf) -> Triplets:
        """The `rank` largest singular values, or all, with their vectors: (d_out, k), (k,), (k, d_in).

        With `energy`, of these only the fewest whose squares sum to it. A few that stand out come from a block Krylov
        iteration, and those of a flat spectrum in float32 from the factors' Gram matrices; all others from two thin
        QRs and a core in float64. What is left, |B A - U S V|, is the least that is possible: to rounding in the wider
        of float32 and the factors' own type, and by the Gram matrices to a share of 5e-4 at most (`_by_grams`; what was
        seen is 1e-9).
        """
        B, A = self.B, self.A
        most = min(*B.shape, A.shape[1])
        rank = most if rank is None else min(rank, most)
        few = rank if energy == inf else min(rank, 1 + most // 48)  # with luck they hold the energy
        steps = most // (8 * few) if few else 0  # the basis stays below a quarter of the core: beyond, that is quicker
        slope = min(SLOWEST, steps / 20)  # a steeper spectrum needs fewer steps, and less time than the Gram matrices
        return (
            self._by_krylov(few, rank, energy, steps, slope)
            or (rank and _by_grams(self, rank, energy))
            or (slope < SLOWEST and self._by_krylov(few, rank, energy, steps, SLOWEST))
            or _through_core(B, A, rank, energy)
        )

    def _by_krylov(self, few: int, rank: int, energy: float, steps: int, slope: float) -> Triplets | None:
        """What the iteration finds, if it is all that is asked for."""
        found = _krylov(self.B, self.A, few, energy, steps, slope) if steps else None
        return found if found and (few == rank or _fewest(found[1], energy) <= few) else None


def svd(B: Tensor, A: Tensor, rank: int | None = None, energy: float = inf) -> Triplets:
    """The leading singular triplets of B A, as `Product.svd` finds them."""
    return Product(B, A).svd(rank, energy)


def _gram(X: Tensor) -> Tensor:
    """X X^T of (R, d) in five eighths of the time of a product, as each of four strips leaves out what is known."""
    G, width = X.new_empty(len(X), len(X)), max(1, -(-len(X) // 4))
    for i in range(0, len(X), width):
        G[i : i + width, i:] = X[i : i + width] @ X[i:].T
        G[i + width :, i : i + width] = G[i : i + width, i + width :].T
    return G


def _fewest(s: Tensor, energy: float) -> int:
    """How many of these singular values, from the first, it takes for their squares to sum to `energy`."""
    return int((s.double().square().cumsum(0) < energy).sum()) + 1


def _krylov(B: Tensor, A: Tensor, rank: int, energy: float, steps: int, slope: float = SLOWEST) -> Triplets | None:
    """Leading triplets of M = B A from a basis Q that grows by residuals; None where they do not converge.

    After Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition (NeurIPS 2015), https://arxiv.org/abs/1504.05477. With E = M M^T U - U S^2 the product is, to first
    order, off the best one by |E_i| / (S_i - S_w) for every i up to k, where S_w is what lies outside of the w = 2 k
    that are followed; it is taken when that is rounding. Where singular values tie at the cut, any of them is best.
    It ends early where S_w / S_k is above `slope`: the spectrum is too flat to tell the leading from the rest.
    """
    tolerance, width = 32 * torch.finfo(B.dtype).eps, 2 * rank
    probe = torch.randn(A.shape[1], width, generator=torch.Generator().manual_seed(0))
    E = B @ (A @ probe.to(A))  # (d_out, width)
    S = _leading_squares(E.T.double(), width)[0].sqrt() / width**0.5  # a first guess
    Q, P = E[:, :0], A[:0]  # (d_out, k), Q^T M (k, d_in)
    for _ in range(steps):
        if S[-1] > slope * S[min(rank, _fewest(S, energy)) - 1]:
            return None
        for _ in range(2):  # once leaves rounding errors, twice none
            E = torch.linalg.qr(E - Q @ (Q.T @ E))[0]
        Q, P = torch.cat([Q, E], 1), torch.cat([P, (E.T @ B) @ A])
        squares, W = _leading_squares(P.double(), width)  # (width,), (k, width)
        S, U, T = squares.sqrt(), Q @ W.to(Q), P.T @ W.to(P)  # T = M^T U
        E = B @ (A @ T) - U * squares.to(U)
        k, off = min(rank, _fewest(S, energy)), E.double().norm(dim=0)
        error = off[:k] / (S[:k] - (squares[-1] + off[-1]).sqrt())
        if bool((error >= 0).all()) and error.norm() <= tolerance * S[:k].norm():
            V, s, w = torch.linalg.svd(T[:, :k], full_matrices=False)
            return U[:, :k] @ w.T, s, V.T
    return None


def _by_grams(product: Product, rank: int, energy: float) -> Triplets | None:
    """Leading triplets from B^T B = L L^T and the eigenvectors X of L^T (A A^T) L = X S^2 X^T, in float32.

    M M^T B L^-T X = B L^-T X S^2, so U = B L^-T X, and S V = X^T L^T A. Rounding moves the square of a singular value
    by about n = 4 eps size(B^T B) size(A A^T), where size(G) = |G|^2 / tr G is a mean of G's eigenvalues, and so what k
    of them leave, |M - M_k|^2, by 2 k n at most: nothing is returned where that is more than 1e-3 of it, so that the
    loss is within 5e-4 of the least there is. Nor is it where a square is so small that n is 1e-5 of it, which would
    tilt its vectors by as much; of few vectors, U is made orthonormal once more.
    """
    R, eps = len(product.A), torch.finfo(torch.float32).eps
    if product.B.dtype != torch.float32 or min(len(product.B), product.A.shape[1]) < R:
        return None  # float64 would lose half its digits, and above full rank a core is smaller
    of_b, of_a = product.grams
    noise = 4 * eps * _size(of_b) * _size(of_a)
    L, failed = torch.linalg.cholesky_ex(of_b + 8 * eps * _size(of_b) * torch.eye(R))
    squares, X = _leading_eigenpairs(L.T @ (of_a @ L), rank, energy)
    k, rest = len(squares), product.energy - float(squares.double().sum())
    few = 8 * k <= R
    if bool(failed) or not 0 < 2 * k * noise <= 1e-3 * rest or (not few and noise > 1e-5 * squares[-1]):
        return None
    U = product.B @ torch.linalg.solve_triangular(L.T, X, upper=True)
    if few:
        U = torch.linalg.qr(U)[0]
        V, S, W = torch.linalg.svd(((U.T @ product.B) @ product.A).T, full_matrices=False)
        return U @ W.T, S, V.T
    S = squares.sqrt()
    return U, S, ((L @ X).T / S[:, None]) @ product.A


def _size(gram: Tensor) -> float:
    """The mean of a Gram matrix's eigenvalues, each weighed by itself: |G|^2 / tr G, or 0 for G = 0."""
    trace = float(gram.trace())
    return float(gram.double().square().sum()) / trace if trace else 0.0


def _leading_eigenpairs(H: Tensor, rank: int, energy: float) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of a symmetric matrix, of these only the fewest that sum to `energy`, and vectors.

    A known few take half the time of all.
    """
    if energy == inf and 8 * rank <= len(H):
        chosen = len(H) - rank, len(H) - 1
        squares, X = map(torch.from_numpy, scipy.linalg.eigh(H.numpy(), subset_by_index=chosen, check_finite=False))
    else:
        squares, X = torch.linalg.eigh(H)
    squares, X = squares.flip(0)[:rank].clamp_min(0), X.flip(1)
    k = min(rank, _fewest(squares.sqrt(), energy))
    return squares[:k], X[:, :k]


def _through_core(B: Tensor, A: Tensor, rank: int, energy: float = inf) -> Triplets:
    """Leading triplets of B A = Q_B (T_B T_A^T) Q_A^T, with each Q left as reflections of the few vectors wanted."""
    (hb, tb), (ha, ta) = (torch.geqrf(x) for x in (B, A.T))
    core = hb[: len(tb)].triu().double() @ ha[: len(ta)].triu().double().T  # (at most R, at most R)
    single = B.dtype == torch.float32 and rank and (energy < inf or 4 * rank <= len(core))
    u, s, v = (_by_squares(core, rank, energy) if single else None) or _whole(core, rank, energy)

    def turn(h: Tensor, tau: Tensor, x: Tensor) -> Tensor:
        return torch.ormqr(h[:, : len(tau)], tau, torch.nn.functional.pad(x.to(h), (0, 0, 0, len(h) - len(x))))

    return turn(hb, tb, u), s.to(B), turn(ha, ta, v).T


def _whole(core: Tensor, rank: int, energy: float) -> Triplets:
    """Leading triplets U, S, V of a core in float64, vectors in columns."""
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    k = min(rank, _fewest(s, energy))
    return u[:, :k], s[:k], vh[:k].T


def _by_squares(core: Tensor, rank: int, energy: float) -> Triplets | None:
    """The same in half the time, by the square of the core, or None where that has not digits enough for float32."""
    squares, u = _leading_squares(core, rank)
    k = _fewest(squares.sqrt(), energy)
    squares, u = squares[:k], u[:, :k]
    return (u, squares.sqrt(), core.T @ u / squares.sqrt()) if squares[-1] > 1e-8 * squares[0] else None


def _leading_squares(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest squared singular values of X, with their left vectors in columns, by the small Gram matrix."""
    squares, u = torch.linalg.eigh(X @ X.T)
    return squares.flip(0)[:k].clamp_min(0), u.flip(1)[:, :k]
