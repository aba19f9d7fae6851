"""FFA-LoRA: A is frozen at its random start; only B is trained, shared and averaged.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning (ICLR 2024), https://arxiv.org/abs/2403.12313

    B <- sum_i p_i B_i,   so   sum_i p_i (B_i A) = B A   exactly.

It wants a larger learning rate than FedIT: PEFT's random A has A A^T of about I/3, and nothing makes it grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy


@dataclass(frozen=True)
class FFALoRA(Strategy[LoRA]):
    exact = True
    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * d_out"

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="BH", shares="BH")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        return state
