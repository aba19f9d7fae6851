"""LA-LoRA: local steps train B and A in turn, and a filter along the features takes most of the noise off each step.

Liu et al., Rethinking LoRA for Privacy-Preserving Federated Learning in Large Models (ICLR 2026),
https://arxiv.org/abs/2602.19926

    steps 1, 3, ... of a round:  B <- B - eta (g_B * G)  with A held,     steps 2, 4, ...:  A <- A - eta (g_A * G),
    then   A <- sum_i p_i A_i,   B <- sum_i p_i B_i            G = [1, 4, 6, 4, 1] / 16, g_B along d_out, g_A along d_in

g is a step's gradient, of DP-SGD clipped and noised before the filter, which is post-processing then. B is first: where
B is zero, A has no gradient. The noise of A never meets that of B within a step; it does over two, and at equal updates
of a side the product has as much of it as under joint steps. The filter leaves white noise 0.27 of its variance, and a
signal as much as it is smooth: hidden units have no order, so that most of a language model's shrinks like the noise
does, and the filter is little more than a lower rate. Compare it with smoothing = false at a rate tuned by itself.

The released code is another method: it clips batches and not records, at a bound that depends on the data, with noise
for less than their sensitivity and no accountant; it smooths along the rank too, and steps once more without; and it
begins with A. Here records are clipped, and all K steps of a round are accounted for. `every` steps make a turn; with 0
a turn is a whole round, and this is RoLoRA. One step a round trains B alone: two or more are needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy, declare

FILTER = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA
    round: int  # finished


@dataclass(frozen=True)
class LALoRA(Strategy[State]):
    """Averages both factors, which local steps trained in turn."""

    every: int = 1  # local steps that a side is trained before the other one; 0: a whole round
    smoothing: bool = True  # filter every step's gradient along the features?

    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every = {self.every}: give the local steps of a turn, or 0 for a whole round")
        if self.every == 0:
            up, down = ("r * (d_out if t % 2 == 0 else d_in)", "r * (d_in if t % 2 == 0 else d_out)")
            declare(self, self, exact=True, up=up, down=down)

    def init(self, lora: LoRA) -> State:
        return State(lora, 0)

    def client_init(self, state: State, client: Client) -> Job:
        taps = FILTER if self.smoothing else ()
        if self.every == 0:
            sides = "BH" if state.round % 2 == 0 else "AH"
            return Job(start=state.lora, trains=sides, shares=sides, smoothing=taps)
        return Job(start=state.lora, turns=("BH",) * self.every + ("AH",) * self.every, smoothing=taps)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        return State(average(updates, weights).over(state.lora), state.round + 1)

    def adapter(self, state: State) -> LoRA:
        return state.lora
