"""RoLoRA: one round trains and averages B with A frozen, the next A with B frozen.

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA (NeurIPS 2025),
https://arxiv.org/abs/2502.01755

    B <- sum_i p_i B_i  in rounds 0, 2, ...,   A <- sum_i p_i A_i  in rounds 1, 3, ...

Every round is exact at half of FedIT's bytes. B is first: where B is zero, A has no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA
    round: int  # finished


@dataclass(frozen=True)
class RoLoRA(Strategy[State]):
    """Averages B and A in alternate rounds."""

    exact = True
    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = "r * (d_out if t % 2 == 0 else d_in)"
    down = "r * (d_in if t % 2 == 0 else d_out)"  # the side of the round before; the other one is held already

    def init(self, lora: LoRA) -> State:
        return State(lora, 0)

    def client_init(self, state: State, client: Client) -> Job:
        sides = "BH" if state.round % 2 == 0 else "AH"
        return Job(start=state.lora, trains=sides, shares=sides)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        return State(average(updates, weights).over(state.lora), state.round + 1)

    def adapter(self, state: State) -> LoRA:
        return state.lora
