"""FLoRIST: FLoRA's stack, cut in every module to the smallest rank that keeps a given share of its energy.

Ramesh and Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models (MLSys 2026), https://arxiv.org/abs/2506.09199

    U S V^T = sum_i p_i B_i A_i,   p = min { k : sum_{j<=k} S_j^2 >= tau sum_j S_j^2 },
    W <- W + s U_p S_p V_p^T,   A anew, B <- 0

The decomposition is of the stacked factors, through a core of their rank. What is cut is lost for good: the factors
start anew, so no later round carries it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average, densify, join, leading, reinitialise, stack, truncate_by_energy
from fedlora.mixed_ranks import Ranks, energy_in_smallest_rank, ranks_of, smallest_ranks
from fedlora.strategy import Client, Job, Strategy, declare


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # where the next round starts, at the largest rank; B is zero but in a first start that has it otherwise
    parts: tuple[LoRA, ...]  # one a round, until together they outgrow a dense one
    round: int
    kept: float  # mean rank over the modules of the last round's part
    dropped: float  # share of the last round's squared singular values that was cut
    smallest: Ranks | None = None  # of the clients so far
    shared: Mapping[str, float] | None = None  # how much of the last round's part is in these ranks


@dataclass(frozen=True)
class FLoRIST(Strategy[State]):
    """Stacks the clients' products, and cuts the stack by its energy."""

    energy: float = 0.9  # tau, the share of the sum of squared singular values that is kept; 1 cuts nothing

    mixed_ranks = True
    up = "r * (d_in + d_out)"
    down = "r * d_in + q * (d_in + d_out)"  # B = 0 the client holds already

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy = {self.energy:g} is no share of the energy; take one above 0 and up to 1")
        declare(self, self, exact=self.energy == 1)

    def init(self, lora: LoRA) -> State:
        return State(lora, (), 0, 0.0, 0.0)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=leading(state.lora, client.rank), offset=state.parts)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        part, kept, dropped = truncate_by_energy(stack(updates, weights), self.energy)
        smallest = smallest_ranks(updates, state.smallest)
        head = average([u.only("H") for u in updates], weights)
        start = head.over(
            reinitialise(state.lora, f"flora/{state.round}")
        )  # with tau = 1 the run is FLoRA's, bit for bit
        shared = energy_in_smallest_rank(part, smallest, ranks_of(state.lora))
        return State(start, densify((*state.parts, part)), state.round + 1, kept, dropped, smallest, shared)

    def adapter(self, state: State) -> LoRA:
        return join(*(state.parts or (state.lora,))).over(state.lora)

    def notes(self, state: State) -> dict[str, float]:
        return {"kept_rank": state.kept, "dropped_energy": state.dropped, **(state.shared or {})}
