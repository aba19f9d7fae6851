"""raFLoRA: FlexLoRA for mixed ranks, with each slot of the rank averaged over those clients alone that hold it.

Wu et al., Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity (2026),
https://arxiv.org/abs/2602.13486

    U S V^T = sum_j sum_{i: r_i > j} (p_i / q_j) b_ij a_ij^T,   q_j = sum_{i: r_i > j} p_i
    B_i <- U[:, :r_i] S[:r_i]^1/2,   A_i <- S[:r_i]^1/2 V[:, :r_i]^T

b_ij and a_ij are column j of B_i and row j of A_i. In FlexLoRA's mean slot j shrinks by q_j every round, even if nobody
moves, until only the smallest rank is left; here clients that do not move get back what they had. It is not the mean of
the clients' models, and noise in a slot that few hold is averaged over few. How the paper treats a slot that nobody of
the round holds could not be read, and the public code drops it for good: here it stays as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedlora.lora import LoRA, at_least_float32, average, inner, join, leading, normalised, stack, truncate
from fedlora.mixed_ranks import Ranks, beyond, energy_in_smallest_rank, filled, ranks_of, smallest_ranks
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # at the largest rank, its directions by size after the first round
    first: LoRA  # the A of the start
    dropped: float  # share of the last mean's squared singular values beyond the largest rank
    smallest: Ranks | None = None  # of the clients so far


@dataclass(frozen=True)
class RaFLoRA(Strategy[State]):
    """Averages the products slot by slot over those that hold the slot, and factorises the mean by an SVD."""

    mixed_ranks = True
    up = down = "r * (d_in + d_out)"

    def init(self, lora: LoRA) -> State:
        return State(lora, lora.only("A"), 0.0)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=leading(state.lora, client.rank))

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        mean = stack(over_holders(updates, weights), weights)
        held = {m: max(u.A[m].shape[0] for u in updates) for m in state.lora.A}
        whole = join(mean, beyond(state.lora, held))
        largest = max(ranks_of(state.first).values())
        lora, energy = filled(truncate(whole, largest), state.first), inner(whole, whole)
        head = average([u.only("H") for u in updates], weights)
        dropped = max(0.0, 1 - inner(lora, lora) / energy) if energy else 0.0
        return State(head.over(lora), state.first, dropped, smallest_ranks(updates, state.smallest))

    def adapter(self, state: State) -> LoRA:
        return state.lora

    def notes(self, state: State) -> dict[str, float]:
        shared = energy_in_smallest_rank(state.lora, state.smallest, ranks_of(state.first))
        return {"dropped_energy": state.dropped, **shared}


def over_holders(updates: Sequence[LoRA], weights: Sequence[float]) -> list[LoRA]:
    """The updates with every column j of B divided by q_j, the share of the weights of those that have a column j."""
    p, q = torch.tensor(normalised(weights), dtype=torch.float64), {}
    for m in updates[0].A:
        ranks = torch.tensor([u.A[m].shape[0] for u in updates])  # (K,)
        q[m] = p @ (torch.arange(int(ranks.max())) < ranks[:, None]).double()  # (r,)
    return [LoRA(u.A, {m: b / q[m][: b.shape[1]].to(at_least_float32(b)) for m, b in u.B.items()}) for u in updates]
