"""FlexLoRA: the mean of the products, by singular values: every client gets its leading directions at its own rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources
(NeurIPS 2024), https://arxiv.org/abs/2402.11505

    U S V^T = sum_i p_i B_i A_i,   B_i <- U[:, :r_i] S[:r_i],   A_i <- V[:, :r_i]^T

W stays as it is, so what lies beyond the largest rank is lost, and what lies beyond a client's own rank is missing from
the product it sends back: such directions shrink every round by the weight of those that hold them, until only the
smallest rank is left (raFLoRA has the remedy; the note `energy_in_smallest_rank` says how far it is). Factors change
their basis every round. A mean of too low a rank is filled up with rows of the first A and columns of zeros, so that no
rank shrinks for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average, inner, leading, principal_part, stack
from fedlora.mixed_ranks import Ranks, energy_in_smallest_rank, filled, ranks_of, smallest_ranks
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # at the largest rank; after the first round A A^T = I but for rows that fill up
    first: LoRA  # the A of the start
    dropped: float  # share of the last mean's squared singular values beyond the largest rank
    smallest: Ranks | None = None  # of the clients so far


@dataclass(frozen=True)
class FlexLoRA(Strategy[State]):
    """Averages the products, and factorises the mean by an SVD."""

    mixed_ranks = True
    up = down = "r * (d_in + d_out)"

    def init(self, lora: LoRA) -> State:
        return State(lora, lora.only("A"), 0.0)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=leading(state.lora, client.rank))

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        part, energy = principal_part(stack(updates, weights), max(a.shape[0] for a in state.first.A.values()))
        lora = filled(part, state.first)
        kept = inner(lora, lora)
        head = average([u.only("H") for u in updates], weights)
        dropped = max(0.0, 1 - kept / energy) if energy else 0.0
        return State(head.over(lora), state.first, dropped, smallest_ranks(updates, state.smallest))

    def adapter(self, state: State) -> LoRA:
        return state.lora

    def notes(self, state: State) -> dict[str, float]:
        shared = energy_in_smallest_rank(state.lora, state.smallest, ranks_of(state.first))
        return {"dropped_energy": state.dropped, **shared}
