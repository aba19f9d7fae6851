"""Singular values of a product of two thin factors, which is never built."""

import torch
from torch import Tensor

Triplets = tuple[Tensor, Tensor, Tensor]


def wide(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def svd(B: Tensor, A: Tensor, rank: int | None = None) -> Triplets:
    """The `rank` largest singular values of B A, or all, with their vectors: (d_out, k), (k,), (k, d_in).

    A few of many come from a block Krylov iteration where that converges in a few steps, as on what training leaves;
    all others from two thin QRs and a core in float64. Either is right to rounding in the wider of float32 and the
    factors' own type.
    """
    B, A = wide(B), wide(A)
    most = min(*B.shape, A.shape[1])
    rank = most if rank is None else min(rank, most)
    steps = most // (8 * rank) if rank else 0  # the basis stays below a quarter of the core: beyond, that is quicker
    return (_krylov(B, A, rank, steps) if steps else None) or _through_core(B, A, rank)


def _krylov(B: Tensor, A: Tensor, rank: int, steps: int) -> Triplets | None:
    """Leading triplets of M = B A from a basis Q that grows by residuals; None where they do not converge.

    After Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
    Decomposition (NeurIPS 2015), https://arxiv.org/abs/1504.05477. With E = M M^T U - U S^2 the product is, to first
    order, off the best one by |E_i| / (S_i - S_rank+1) for every i; it is taken when that is rounding.
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
        off = E.double().norm(dim=0)
        error = off[:rank] / (S[:rank] - (squares[rank] + off[rank]).sqrt())
        if bool((error >= 0).all()) and error.norm() <= tolerance * S[:rank].norm():
            V, s, w = torch.linalg.svd(T[:, :rank], full_matrices=False)
            return U[:, :rank] @ w.T, s, V.T
        if S[-1] > 0.8 * S[rank - 1]:
            return None  # the spectrum is too flat for so few steps to tell the leading from the rest
    return None


def _through_core(B: Tensor, A: Tensor, rank: int) -> Triplets:
    """Leading triplets of B A = Q_B (T_B T_A^T) Q_A^T, with each Q left as reflections of the few vectors wanted."""
    (hb, tb), (ha, ta) = (torch.geqrf(x) for x in (B, A.T))
    core = hb[: len(tb)].triu().double() @ ha[: len(ta)].triu().double().T  # (at most R, at most R)
    u, s, v = _of_core(core, rank, squared=B.dtype == torch.float32 and 0 < 4 * rank <= len(core))

    def turn(h: Tensor, tau: Tensor, x: Tensor) -> Tensor:
        return torch.ormqr(h[:, : len(tau)], tau, torch.nn.functional.pad(x.to(h), (0, 0, 0, len(h) - len(x))))

    return turn(hb, tb, u), s.to(B), turn(ha, ta, v).T


def _of_core(core: Tensor, rank: int, squared: bool) -> Triplets:
    """Leading triplets U, S, V (vectors in columns) of a core in float64.

    By its square where asked: that halves the digits, and those which float32 factors had are among the half kept.
    """
    if squared:
        squares, u = _leading_squares(core, rank)
        if squares[-1] > 1e-8 * squares[0]:
            return u, squares.sqrt(), core.T @ u / squares.sqrt()
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def _leading_squares(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest squared singular values of X, with their left vectors in columns, by the small Gram matrix."""
    squares, u = torch.linalg.eigh(X @ X.T)
    return squares.flip(0)[:k].clamp_min(0), u.flip(1)[:, :k]
