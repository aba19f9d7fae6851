"""LoRA-FAIR: FedAvg on the factors, and B is corrected so that the product comes closer to the mean of products.

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement (ICCV 2025),
https://arxiv.org/abs/2411.14961

    A <- sum_i p_i A_i,   B <- B' + dB,   B' = sum_i p_i B_i,   W* = sum_i p_i B_i A_i
    least_squares:  dB = argmin |W* - (B' + dB) A|^2 + lam |dB|^2
    cosine:         dB by gradient descent on 1 - cos(W*, (B' + dB) A) + lam |dB|^2 / |B' A|^2, then B' + dB rescaled

Only what lies in the rows of A is won back, at lam = 0 the projection of FedEx's residual on them; the rest is lost.
The paper has the cosine, which is blind to the norm, with a plain |dB|, which at its own lam can hold dB at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from fedlora.lora import LoRA, average, inner, normalised, stack
from fedlora.strategy import Client, Job, Strategy


@dataclass(frozen=True)
class LoRAFair(Strategy[LoRA]):
    """Averages both factors, and corrects B."""

    form: Literal["least_squares", "cosine"] = "least_squares"
    lam: float = 0.01
    steps: int = 100  # of the cosine's descent
    lr: float = 0.5  # of the cosine's descent, over the largest eigenvalue of A A^T

    continues = True
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if self.lam < 0:
            raise ValueError(f"lam = {self.lam:g}: a penalty is not negative; 0 corrects as far as A's rows reach")

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state)

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        mean, B = average(updates, weights), {}
        for m, b in mean.B.items():
            a = mean.A[m].double()
            G = a @ a.T  # (r, r)
            N = _missed(m, mean, updates, weights)
            if self.form == "least_squares":
                dB = N @ torch.linalg.pinv(G + self.lam * torch.eye(len(G), dtype=G.dtype), hermitian=True)
            else:
                dB = self._descend(b.double(), G, N, _size(m, updates, weights))
            B[m] = b + dB.to(b)
        return LoRA(mean.A, B, mean.H)

    def adapter(self, state: LoRA) -> LoRA:
        return state

    def _descend(self, b: Tensor, G: Tensor, N: Tensor, size: float) -> Tensor:
        """The dB of the cosine form (d_out, r), from B' (d_out, r), A A^T, (W* - B' A) A^T (d_out, r) and |W*|.

        In units in which |B' A| = 1, for a cosine's slope grows as 1/|B|; the penalty's step is implicit, so that no
        lam is too large for lr.
        """
        M = N + b @ G  # W* A^T (d_out, r)
        unit = float((b @ G * b).sum())  # |B' A|^2
        dB = torch.zeros_like(b)
        if not unit or not size:
            return dB  # no direction to turn, or none to turn to
        step = self.lr / float(torch.linalg.matrix_norm(G, 2))
        for _ in range(self.steps):
            x = b + dB
            xG = x @ G
            c2 = float((xG * x).sum())  # |x A|^2
            slope = (M - float((M * x).sum()) / c2 * xG) / (size * c2**0.5)  # of cos(W*, x A)
            dB = (dB + step * unit * slope) / (1 + 2 * step * self.lam)
        x = b + dB
        return x * (M * x).sum() / (x @ G * x).sum() - b


def _missed(m: str, mean: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> Tensor:
    """(W* - B' A) A^T = sum_i p_i (B_i - B') (A_i - A) A^T (d_out, r); means come off first, to keep the digits."""
    A, B = mean.A[m], mean.B[m]
    N = torch.zeros_like(B)
    for p, x in zip(normalised(weights), updates, strict=True):
        N.addmm_(x.B[m] - B, (x.A[m] - A) @ A.T, alpha=p)
    return N.double()


def _size(m: str, updates: Sequence[LoRA], weights: Sequence[float]) -> float:
    """|W*|."""
    whole = stack([LoRA({m: x.A[m]}, {m: x.B[m]}) for x in updates], weights)
    return sqrt(inner(whole, whole))
