"""FedEx-LoRA: FedAvg on the factors, and the residual that averaging them loses goes into the weights.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models
(ACL 2025), https://arxiv.org/abs/2410.09432

    A <- sum_i p_i A_i,   B <- sum_i p_i B_i,   W <- W + s (sum_i p_i B_i A_i - B A)

The residual of K clients has rank (K - 1) r. The paper weighs clients alike; any weights are exact. With `rank` only
the residual's best approximation of that rank is sent, and the rest is lost. `assignment` is what clients go on from:

    average   the means, as above
    reinit    a new A and B = 0, with W <- W + s sum_i p_i B_i A_i: this is FLoRA, and any ranks do
    keep      their own B_i A_i, over weights less s B_i A_i, so that all compute with the same model; any ranks do

Of `keep` the paper writes W_i <- W_i + s (sum_j p_j B_j A_j - B_i A_i) every round. Taken at its word, W_i still holds
the terms of the rounds before, of factors that have moved on since. Here a client's B_i A_i is taken off once, as it is
now, and the server adds up how the products changed, so that clients that sat out rounds are counted right too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fedlora.lora import LoRA, average, densify, join, leading, reinitialise, residual, stack, truncate
from fedlora.strategy import Client, Job, Strategy, declare


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # where clients start
    parts: tuple[LoRA, ...]  # the offset: one a round, until together they outgrow a dense one
    round: int


@dataclass(frozen=True)
class FedEx(Strategy[State]):
    """Averages both factors, and adds the residual to the offset."""

    rank: int = 0  # of what is kept of the residual; 0: all of it
    assignment: Literal["average", "reinit", "keep"] = "average"

    exact = True
    continues = True
    up = "r * (d_in + d_out)"
    down = "K * r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if self.rank < 0 or (self.rank and self.assignment != "average"):
            raise ValueError(
                f"rank = {self.rank} with assignment = {self.assignment}: take 0, or with assignment = average, "
                "which alone leaves a residual to cut, a rank above 0"
            )
        if self.rank:
            declare(self, self, exact=False, down="(r + q) * (d_in + d_out)")
        if self.assignment == "reinit":
            declare(self, self, mixed_ranks=True, continues=False, down="r * d_in + R * (d_in + d_out)")
        if self.assignment == "keep":
            twice = {"up": "2 * r * (d_in + d_out)", "down": "2 * R * (d_in + d_out)"}  # what is new and what was
            declare(self, self, mixed_ranks=True, continues=False, **twice)

    def init(self, lora: LoRA) -> State:
        started = self.assignment == "keep" and any(bool(b.any()) for b in lora.B.values())
        return State(lora, (lora.only("AB"),) if started else (), 0)

    def client_init(self, state: State, client: Client) -> Job:
        start = state.lora if self.assignment == "average" else leading(state.lora, client.rank)
        return Job(start=start, offset=state.parts, resumes=self.assignment == "keep")

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        if self.assignment == "average":
            part = residual(updates, weights)
            part = truncate(part, self.rank) if self.rank else part
            return State(average(updates, weights), densify((*state.parts, part)), state.round + 1)
        start = reinitialise(state.lora, f"flora/{state.round}") if self.assignment == "reinit" else state.lora
        head = average([u.only("H") for u in updates], weights)
        return State(head.over(start), densify((*state.parts, stack(updates, weights))), state.round + 1)

    def adapter(self, state: State) -> LoRA:
        own = () if self.assignment == "keep" and state.parts else (state.lora,)
        return join(*state.parts, *own).over(state.lora)
