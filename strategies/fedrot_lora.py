"""FedRot-LoRA: FedAvg on factors that are first rotated towards the global ones, each client's product left as it is.

Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA (ICML 2026),
https://arxiv.org/abs/2602.23638

    A <- sum_i p_i R_i^T A_i,   B <- sum_i p_i B_i R_i,   where   (B_i R_i) (R_i^T A_i) = B_i A_i   and, over rotations,
    R_i = argmin |R^T A_i - A|  in rounds 0, 2, ...,   R_i = argmin |B_i R - B|  in rounds 1, 3, ...

with the A and B that the round started from. `soft`, the paper's lambda, goes that share of the way: R_i becomes the
rotation nearest to (1 - lambda) 1 + lambda R_i; 0 is FedIT. The paper rotates on the client; the server has the same
factors and finds the same rotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.lora import LoRA, at_least_float32, average
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA
    round: int  # finished


@dataclass(frozen=True)
class FedRot(Strategy[State]):
    """Averages factors that are first rotated towards the global ones."""

    soft: float = 1.0  # lambda, from 0 (no rotation) to 1 (all of it)

    kinds = ("lora", "dora")
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft = {self.soft:g}: a share of the rotation is from 0 to 1")

    def init(self, lora: LoRA) -> State:
        return State(lora, 0)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=state.lora)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        return State(average([self._aligned(x, state) for x in updates], weights), state.round + 1)

    def adapter(self, state: State) -> LoRA:
        return state.lora

    def _aligned(self, x: LoRA, state: State) -> LoRA:
        A, B, last = {}, {}, state.lora
        for m in x.A:
            a, b = at_least_float32(x.A[m]), at_least_float32(x.B[m])
            M = (
                a @ at_least_float32(last.A[m]).T if state.round % 2 == 0 else b.T @ at_least_float32(last.B[m])
            )  # (r, r)
            R = rotation(M, self.soft)
            A[m], B[m] = R.T @ a, b @ R
        return LoRA(A, B, x.H)


def rotation(M: Tensor, soft: float) -> Tensor:
    """The rotation R (r, r) that makes tr(R^T M) largest, or the share `soft` of the way to it.

    Directions of which M says nothing, being zero to near its rounding, stay as they are, not where noise turns them.
    """
    unit = torch.eye(len(M), dtype=torch.float64)
    silence = 1e3 * torch.finfo(M.dtype).eps * float(M.norm()) or 1.0
    R = _nearest(M.double() + silence * unit)
    return _nearest((1 - soft) * unit + soft * R).to(M)


def _nearest(M: Tensor) -> Tensor:
    """The rotation nearest to M (r, r) (Kabsch): polar factor, with the weakest direction turned where it reflects."""
    U, _, Vh = torch.linalg.svd(M)
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    R: Tensor = U @ Vh
    return R
