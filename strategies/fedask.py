"""FedASK: the mean of the products from sums alone, by a sketch of it and then by its projection onto that.

Wen et al., Differentially Private Federated Low Rank Adaptation Beyond Fixed-Matrix (NeurIPS 2025),
https://arxiv.org/abs/2507.09990

    M = sum_i p_i B_i A_i,   Omega (d_in, w) from N(0, 1/w), anew every round and alike for all
    Y = sum_i p_i B_i (A_i Omega),   Q = qr(Y)                   first pass: all train, and send the sketch
    Z = sum_i p_i (Q^T B_i) A_i,     U S V^T = Q Z = Q Q^T M     second pass: of the same factors, none trains
    B <- U_r S_r^1/2,   A <- S_r^1/2 V_r^T,   W <- W + s sum_{j>r} U_j S_j V_j^T

The last term, `rest`, is not the paper's. With it and w >= rank(M), in general the sum of the ranks of those that
answered, the new model is the mean of the clients' models, FedMomentum's and FLoRA's, which need every update. With
less width it is off by what a randomised SVD leaves, and without `rest` by what is beyond rank r besides. Where B alone
is trained, as in the paper's private form, one sum does all of this: take `fedsvd`. The public code makes both sums on
the server from whole factors, and draws Omega once, which leaves it blind to the same directions ever after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fedlora.lora import LoRA, Side, at_least_float32, average, densify, inner, join, leading, truncate_by_energy
from fedlora.mixed_ranks import beyond, filled, ranks_of
from fedlora.seeds import derive
from fedlora.strategy import Client, Job, Strategy, declare


class State(NamedTuple):
    """What the server keeps between rounds, and between the two passes of one."""

    lora: LoRA  # where clients start, at the largest rank
    first: LoRA  # the A of the start
    parts: tuple[LoRA, ...]  # the offset: the rests, until together they outgrow a dense one
    omega: Side  # (d_in, w), of the round to come
    between: LoRA = LoRA()  # Q as B, and the new head: after a first pass, and empty after a second
    round: int = 0
    dropped: float = 0.0  # share of the squared singular values of Q Z that is beyond rank r and in no part


@dataclass(frozen=True)
class FedASK(Strategy[State]):
    """Sketches the mean of the products in one pass, and projects it in a second."""

    width: int = 0  # w; 0: twice the adapter's rank
    rest: bool = True  # what is beyond the adapter's rank goes into the offset; else it is lost

    mixed_ranks = True
    sums_only = True
    exchanges = 2

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError(f"width = {self.width}: give the columns of the sketch, or 0 for twice the rank")
        w, rest = self.width or "2 * r_max", " + q" if self.rest else ""
        declare(self, self, up=f"{w} * (d_in + d_out)", down=f"(r + {w}{rest}) * (d_in + d_out)")

    def init(self, lora: LoRA) -> State:
        return State(lora, lora.only("A"), (), self._omega(lora, 0))

    def client_init(self, state: State, client: Client) -> Job:
        start = leading(state.lora, client.rank)
        if state.between:
            return Job(start=start, offset=state.parts, trains="", shares="A", left=state.between.B)
        return Job(start=start, offset=state.parts, shares="BH", right=state.omega)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        mean = average(updates, weights)
        if not state.between:
            return state._replace(between=LoRA(B={m: torch.linalg.qr(y).Q for m, y in mean.B.items()}, H=mean.H))
        whole = truncate_by_energy(LoRA(mean.A, state.between.B), 1.0)[0]
        rest, energy, t = beyond(whole, ranks_of(state.first)), inner(whole, whole), state.round + 1
        lora = state.between.only("H").over(filled(whole, state.first))
        dropped = 0.0 if self.rest or not energy else inner(rest, rest) / energy
        parts = densify((*state.parts, rest)) if self.rest else ()
        return State(lora, state.first, parts, self._omega(state.first, t), round=t, dropped=dropped)

    def adapter(self, state: State) -> LoRA:
        return join(*state.parts, state.lora).over(state.lora.only("H"))

    def notes(self, state: State) -> dict[str, float]:
        return {"dropped_energy": state.dropped}

    def _omega(self, lora: LoRA, t: int) -> Side:
        def drawn(m: str, d_in: int, w: int) -> Tensor:
            return torch.randn(d_in, w, generator=torch.Generator().manual_seed(derive(f"fedask/{t}", m))) / sqrt(w)

        return {m: drawn(m, a.shape[1], self.width or 2 * len(a)).to(at_least_float32(a)) for m, a in lora.A.items()}
