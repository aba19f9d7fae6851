"""FedEx-LoRA: FedAvg on the factors, and the residual that averaging them loses goes into the weights.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models
(ACL 2025), https://arxiv.org/abs/2410.09432

    A <- sum_i p_i A_i,   B <- sum_i p_i B_i,   W <- W + s (sum_i p_i B_i A_i - B A)

The residual of K clients has rank (K - 1) r. The paper weighs clients alike; any weights are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average, contrast, join, settle
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    lora: LoRA
    residuals: tuple[LoRA, ...]  # one a round, until together they outgrow a dense one


@dataclass(frozen=True)
class FedEx(Strategy[State]):
    exact = True
    continues = True
    up = "r * (d_in + d_out)"
    down = "K * r * (d_in + d_out)"

    def init(self, lora: LoRA) -> State:
        return State(lora, ())

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=state.lora, offset=state.residuals)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        residuals = settle((*state.residuals, contrast(updates, weights)))
        return State(average(updates, weights), residuals)

    def adapter(self, state: State) -> LoRA:
        return join(*state.residuals, state.lora).over(state.lora)
