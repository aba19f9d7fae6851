"""Singular values of a product of two thin factors, which is never built."""

from math import inf

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]


def at_least_float32(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def row_signs(A: Tensor) -> Tensor:
    """The sign of each row's entry of largest absolute value, by which that entry becomes positive: (r, 1)."""
    largest = A.gather(1, A.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(A)


def svd(B: Tensor, A: Tensor, rank: int | None = None, energy: float = inf) -> Triplets:
    """The `rank` largest singular values of B A, or all, with their vectors: (d_out, k), (k,), (k, d_in).

    With `energy`, of these only the fewest whose squares sum to it. A few of many come from a block Krylov iteration
    where that converges in a few steps, as on what training leaves; all others from two thin QRs and a core in float64.
    Either is right to rounding in the wider of float32 and the factors' own type.
    """
    B, A = at_least_float32(B), at_least_float32(A)
    most = min(*B.shape, A.shape[1])
    rank = most if rank is None else min(rank, most)
    few = rank if energy == inf else min(rank, 1 + most // 32)  # with luck they hold the energy
    steps = most // (8 * few) if few else 0  # the basis stays below a quarter of the core: beyond, that is quicker
    found = _krylov(B, A, few, energy, steps) if steps else None
    if found and (few == rank or _fewest(found[1], energy) <= few):
        return found
    return _through_core(B, A, rank, energy)


def _fewest(s: Tensor, energy: float) -> int:
    """How many of these singular values, from the first, it takes for their squares to sum to `energy`."""
    return int((s.double().square().cumsum(0) < energy).sum()) + 1


def _krylov(B: Tensor, A: Tensor, rank: int, energy: float, steps: int) -> Triplets | None:
    """Leading triplets of M = B A from a basis Q that grows by residuals; None where they do not converge.

    After Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition (NeurIPS 2015), https://arxiv.org/abs/1504.05477. With E = M M^T U - U S^2 the product is, to first
    order, off the best one by |E_i| / (S_i - S_k+1) for every i up to k; it is taken when that is rounding.
    """
    tolerance, width = 32 * torch.finfo(B.dtype).eps, 2 * rank
    probe = torch.randn(A.shape[1], width, generator=torch.Generator().manual_seed(0))
    E = B @ (A @ probe.to(A))  # (d_out, width)
    Q, P = E[:, :0], A[:0]  # (d_out, k), Q^T M (k, d_in)
    for _ in range(steps):
        for _ in range(2):  # once leaves rounding errors, twice none
            E = torch.linalg.qr(E - Q @ (Q.T @ E))[0]
        Q, P = torch.cat([Q, E], 1), torch.cat([P, (E.T @ B) @ A])
        squares, W = _leading_squares(P.double(), width)  # (width,), (k, width)
        S, U, T = squares.sqrt(), Q @ W.to(Q), P.T @ W.to(P)  # T = M^T U
        E = B @ (A @ T) - U * squares.to(U)
        k, off = min(rank, _fewest(S, energy)), E.double().norm(dim=0)
        error = off[:k] / (S[:k] - (squares[k] + off[k]).sqrt())
        if bool((error >= 0).all()) and error.norm() <= tolerance * S[:k].norm():
            V, s, w = torch.linalg.svd(T[:, :k], full_matrices=False)
            return U[:, :k] @ w.T, s, V.T
        if S[-1] > 0.8 * S[k - 1]:
            return None  # the spectrum is too flat for so few steps to tell the leading from the rest
    return None


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
