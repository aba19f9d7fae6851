"""HetLoRA: clients of different ranks hold the leading rows of one A and columns of one B; means are over zeros too.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (EMNLP 2024),
https://arxiv.org/abs/2401.06432

    A_i <- A[:r_i],   B_i <- B[:, :r_i];   then with zeros up to the largest rank
    A <- sum_i w_i A_i,   B <- sum_i w_i B_i,   w_i = ||B_i A_i||_F / sum_j ||B_j A_j||_F

The mean of the factors is as inexact as FedIT's, and directions that few clients hold are pulled towards zero. Rows
that no client of the round holds stay as they were: zeroed in A and B alike, no gradient could ever move them again.
The note `energy_in_smallest_rank` says how much of the adapter lies in the directions that all clients hold.
The paper's self-pruning of ranks is not offered: a client's rank is its own for the whole run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad

from fedlora.lora import LoRA, at_least_float32, average, leading, norm, principal
from fedlora.mixed_ranks import Ranks, energy_in_smallest_rank, ranks_of, smallest_ranks
from fedlora.strategy import Client, Job, Strategy, declare


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # at the largest rank
    smallest: Ranks | None = None  # of the clients so far


@dataclass(frozen=True)
class HetLoRA(Strategy[State]):
    """Averages factors of different ranks, padded with zeros."""

    weighting: Literal["norm", "examples"] = "norm"  # of the factors; the head's is by the run's weights

    mixed_ranks = True
    continues = True
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        declare(self, self, sums_only=self.weighting == "examples", own_weights=self.weighting == "norm")

    def init(self, lora: LoRA) -> State:
        return State(lora)

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=leading(as_state(state).lora, client.rank))

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        before, smallest = as_state(state)
        ranks = {m: max(u.A[m].shape[0] for u in updates) for m in before.A}
        mean = average([padded(u, ranks) for u in updates], self._weights(updates, weights))
        A = {m: torch.cat([mean.A[m], at_least_float32(a[ranks[m] :])]) for m, a in before.A.items()}
        B = {m: torch.cat([mean.B[m], at_least_float32(b[:, ranks[m] :])], 1) for m, b in before.B.items()}
        head = average([u.only("H") for u in updates], weights)
        return State(LoRA(A, B, head.H), smallest_ranks(updates, smallest))

    def adapter(self, state: State) -> LoRA:
        return as_state(state).lora

    def notes(self, state: State) -> dict[str, float]:
        lora, smallest = as_state(state)
        largest = ranks_of(lora)
        return energy_in_smallest_rank(principal(lora, max(largest.values())), smallest, largest)

    def _weights(self, updates: Sequence[LoRA], weights: Sequence[float]) -> Sequence[float]:
        """The w_i of the factors; the run's weights while no client has a product yet."""
        if self.weighting == "examples":
            return weights
        norms = [norm(u.only("AB")) for u in updates]
        return norms if any(norms) else weights


def as_state(state: State | LoRA) -> State:
    """The state, of which checkpoints of earlier versions hold the adapter alone."""
    return State(state) if isinstance(state, LoRA) else state


def padded(lora: LoRA, ranks: dict[str, int]) -> LoRA:
    """The factors with zeros up to these ranks, (rank, d_in) and (d_out, rank); the product is the same."""
    A = {m: pad(a, (0, 0, 0, ranks[m] - a.shape[0])) for m, a in lora.A.items()}
    B = {m: pad(b, (0, ranks[m] - b.shape[1])) for m, b in lora.B.items()}
    return LoRA(A, B)
