"""FedIT: FedAvg on the LoRA factors.

Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning (2023), https://arxiv.org/abs/2305.05644

    A <- sum_i p_i A_i,   B <- sum_i p_i B_i

The mean of products is not the product of means: the new model misses sum_i p_i (B_i - B)(A_i - A).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy


@dataclass(frozen=True)
class FedAvg(Strategy[LoRA]):
    """Averages both factors."""

    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * (d_in + d_out)"

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state)

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights)

    def adapter(self, state: LoRA) -> LoRA:
        return state
