"""FLoRA: the clients' factors are stacked into the weights, and every round starts from a new A and B = 0.

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations (NeurIPS 2024),
https://arxiv.org/abs/2409.05976

    W <- W + s [p_1 B_1 | ... | p_K B_K] [A_1; ...; A_K] = W + s sum_i p_i B_i A_i,   A anew, B <- 0

A client of rank r_i takes the first r_i rows of the new A. What is sent down grows with the sum of the ranks, and
nothing learnt stays in the factors: each round has to find its directions again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average, densify, join, leading, reinitialise, stack
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # where the next round starts, at the largest rank; B is zero but in a first start that has it otherwise
    stacks: tuple[LoRA, ...]  # one a round, of rank sum_i r_i, until together they outgrow a dense one
    round: int


@dataclass(frozen=True)
class FLoRA(Strategy[State]):
    """Stacks the clients' products into the offset, and starts every round from a new A and B = 0."""

    exact = True
    mixed_ranks = True
    up = "r * (d_in + d_out)"
    down = "r * d_in + R * (d_in + d_out)"  # B = 0 the client holds already

    def init(self, lora: LoRA) -> State:
        return State(lora, (), 0)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=leading(state.lora, client.rank), offset=state.stacks)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        head = average([u.only("H") for u in updates], weights)
        start = head.over(reinitialise(state.lora, f"flora/{state.round}"))
        return State(start, densify((*state.stacks, stack(updates, weights))), state.round + 1)

    def adapter(self, state: State) -> LoRA:
        return join(*(state.stacks or (state.lora,))).over(state.lora)
