"""DP-LoRA: FedIT with every example's gradient clipped, the half of DP-SGD that bounds what one example can do.

Liu et al., Differentially Private Low-Rank Adaptation of Large Language Model Using Federated Learning (2023),
https://arxiv.org/abs/2312.17493

    g_j <- g_j min(1, C / |g_j|),   step along sum_j g_j / b,   then   A <- sum_i p_i A_i,   B <- sum_i p_i B_i

g_j is one example's gradient over all that is trained, A, B and head together. The paper clips the gradients of whole
batches, those of A and of B apart: there one example can move a step by 2 C in each, however large the batch. It
weighs clients alike: server.weights = uniform. WITHOUT NOISE THIS IS NOT PRIVATE: dp.epsilon or dp.noise adds it, as to
every strategy, and then clips at dp.clip instead. trains = B is DP-FFA-LoRA: exact, and no noise is squared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy, declare


@dataclass(frozen=True)
class DPLoRA(Strategy[LoRA]):
    """Averages both factors, or B alone, trained with clipped gradients of single examples."""

    trains: Literal["AB", "B"] = "AB"  # and the head
    clip: float = 1.0  # C, the largest norm of one example's gradient, where the run adds no noise

    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ValueError(f"clip = {self.clip:g}: without a bound on an example's gradient use fedavg or ffa_lora")
        if self.trains == "B":
            declare(self, self, exact=True, up="r * d_out", down="r * d_out")

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        sides = self.trains + "H"
        return Job(start=state, trains=sides, shares=sides, example_clip=self.clip)

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        return state
