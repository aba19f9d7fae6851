"""FedSVD: FFA-LoRA whose frozen A the server replaces, round by round, by the principal directions of the mean.

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA (NeurIPS 2025),
https://arxiv.org/abs/2505.12805

    B <- sum_i p_i B_i,   then   B A = U S V^T,   B <- U S,   A <- V^T

The product stays, A A^T = I, and A crosses the wire again. A turns within the span of its first rows and never leaves
it, so with SGD, noised or not, this is FFA-LoRA with an orthonormal A; only an optimizer like Adam tells them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average, principal
from fedlora.strategy import Client, Job, Strategy, declare


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA
    round: int  # finished


@dataclass(frozen=True)
class FedSVD(Strategy[State]):
    """Averages B over a frozen A, and factorises the product anew."""

    every: int = 1  # rounds between decompositions; 0: never, which is FFA-LoRA

    exact = True
    sums_only = True
    kinds = ("lora", "dora")
    up = "r * d_out"
    down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every = {self.every}: give the rounds between decompositions, or 0 for none")
        if self.every != 1:
            with_a = f"r * (d_out + d_in * (t % {self.every} == 0))"
            declare(self, self, continues=not self.every, down=with_a if self.every else "r * d_out")

    def init(self, lora: LoRA) -> State:
        return State(lora, 0)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=state.lora, trains="BH", shares="BH")

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        lora, t = average(updates, weights).over(state.lora), state.round + 1
        if self.every and t % self.every == 0:
            rank = max(a.shape[0] for a in lora.A.values())  # nothing is cut: a B of lower rank keeps all of A's span
            lora = principal(lora, rank).over(lora)
        return State(lora, t)

    def adapter(self, state: State) -> LoRA:
        return state.lora
