"""The singular value decomposition of a product of two thin factors, which is never built."""

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def svd(B: Tensor, A: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values of B A, or all, with their vectors: (d_out, k), (k,), (k, d_in).

    Few of many come from a block Krylov iteration where it converges within few steps, as it does on what training
    leaves; otherwise from two thin QRs and a core in float64. Both are right to rounding in the factors' own type.
    """
    B, A = wide(B), wide(A)
    most = min(*B.shape, A.shape[1])
    rank = most if rank is None else min(rank, most)
    found = _krylov(B, A, rank, most // (8 * rank)) if rank else None
    return found or _through_core(B, A, rank)


def _krylov(B: Tensor, A: Tensor, rank: int, steps: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets of M = B A from a basis Q that grows by residuals, or None where that is not the quick way.

    Musco and Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition
    (NeurIPS 2015), https://arxiv.org/abs/1504.05477. Accepted is what is proved: with E = M M^T U - U S^2, column by
    column, the product lies within |E_i / (S_i - S_rank+1)| of the best one, to first order.
    """
    tolerance = 32 * torch.finfo(B.dtype).eps
    probe = torch.randn(A.shape[1], 2 * rank, generator=torch.Generator().manual_seed(0))
    E = B @ (A @ probe.to(A))  # (d_out, l), l = 2 rank
    Q, P = E[:, :0], A[:0]
    for _ in range(steps):
        for _ in range(2):  # the first pass leaves rounding errors, the second none
            E = torch.linalg.qr(E - Q @ (Q.T @ E))[0]
        Q, P = torch.cat([Q, E], 1), torch.cat([P, (E.T @ B) @ A])  # (d_out, k), (k, d_in) = Q^T M
        core = P.double() @ P.double().T
        squares, W = (x.flip(-1)[..., : 2 * rank] for x in torch.linalg.eigh(core))
        S = squares.clamp_min(0).sqrt()
        U, T = Q @ W.to(Q), P.T @ W.to(P)  # (d_out, l), (d_in, l) = M^T U
        E = B @ (A @ T) - U * squares.to(U)
        size = E.double().norm(dim=0)
        error = size[:rank] / (S[:rank] - S[rank] - size[rank] / S[rank])
        if bool((error >= 0).all()) and float(error.norm()) <= tolerance * float(S[:rank].norm()):
            V, s, w = torch.linalg.svd(T[:, :rank], full_matrices=False)
            return U[:, :rank] @ w.T, s, V.T
        if S[-1] > 0.8 * S[rank - 1]:
            return None  # too flat to tell the leading from the rest by so few steps
    return None


def _through_core(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets of B A = Q_B (T_B T_A^T) Q_A^T, the Qs kept as reflections and applied to what is wanted only."""
    (hb, tb), (ha, ta) = (torch.geqrf(x) for x in (B, A.T))
    core = hb[: len(tb)].triu().double() @ ha[: len(ta)].triu().double().T  # (k_B, k_A)
    u, s, vh = _svd(core, rank, B.dtype == torch.float32)

    def apply(h: Tensor, tau: Tensor, x: Tensor) -> Tensor:
        return torch.ormqr(h[:, : len(tau)], tau, torch.nn.functional.pad(x.to(h), (0, 0, 0, len(h) - len(x))))

    return apply(hb, tb, u), s.to(B.dtype), apply(ha, ta, vh.T).T


def _svd(core: Tensor, rank: int, single: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets of a core in float64; `single` where its digits beyond float32's mean nothing."""
    if single and 4 * rank <= len(core):
        squares, u = (x.flip(-1)[..., :rank] for x in torch.linalg.eigh(core @ core.T))
        if squares[-1] > 1e-8 * squares[0]:  # squaring halves the digits, and these have enough left
            s = squares.sqrt()
            return u, s, (core.T @ u / s).T
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]
