"""FedMomentum: the mean of the products, of which the leading directions are trained on and the rest goes into W.

Yan et al., FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning (2026),
https://arxiv.org/abs/2603.08014

    U S V^T = sum_i p_i B_i A_i,   q = max(r, min { k : sum_{j<=k} S_j^2 >= tau sum_j S_j^2 }),
    B <- U_r S_r^1/2,   A <- S_r^1/2 V_r^T,   W <- W + s sum_{r<j<=q} U_j S_j V_j^T

The momentum is of directions, which survive the round; there is no momentum term. With tau = 1 the new model is the
mean of the clients' models, FedEx-LoRA's and FLoRA's, with the smallest rest that any factors of rank r can leave.
Public code of others adds the rest without s, and lets q fall below r, which changes the adapter's shape; the paper's
default tau could not be read. A client of lower rank, which the paper has not, starts from its leading directions and
has the others in its offset: all compute with one model. A mean of too low a rank is filled with rows of the first A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average, densify, join, leading, stack, truncate_by_energy
from fedlora.mixed_ranks import beyond, filled, ranks_of
from fedlora.strategy import Client, Job, Strategy, declare


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA  # where clients start, at the largest rank
    first: LoRA  # the A of the start
    parts: tuple[LoRA, ...]  # the offset: one a round, until together they outgrow a dense one
    kept: float  # mean rank over the modules of what was kept of the last mean
    dropped: float  # share of the last mean's squared singular values that was cut


@dataclass(frozen=True)
class FedMomentum(Strategy[State]):
    """Averages the products, trains on with the leading directions, and adds the rest to the offset."""

    energy: float = 1.0  # tau, the share of the sum of squared singular values that is kept; 1 cuts nothing

    mixed_ranks = True
    up = "r * (d_in + d_out)"
    down = "(r_max + q) * (d_in + d_out)"  # at most, where the rest is cut: then a round may have none

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy = {self.energy:g} is no share of the energy; take one above 0 and up to 1")
        declare(self, self, exact=self.energy == 1, down=self.down if self.energy == 1 else "")

    def init(self, lora: LoRA) -> State:
        return State(lora, lora.only("A"), (), 0.0, 0.0)

    def client_init(self, state: State, client: Client) -> Job:
        start = leading(state.lora, client.rank)
        higher = beyond(state.lora, ranks_of(start))
        return Job(start=start, offset=(*([higher] if higher else []), *state.parts))

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        models = [join(u, beyond(state.lora, ranks_of(u))) for u in updates]  # what each adds to the common parts
        least = ranks_of(state.first)
        part, kept, dropped = truncate_by_energy(stack(models, weights), self.energy, least)
        head = average([u.only("H") for u in updates], weights)
        parts = densify((*state.parts, beyond(part, least)))
        return State(head.over(filled(part, state.first)), state.first, parts, kept, dropped)

    def adapter(self, state: State) -> LoRA:
        return join(*state.parts, state.lora).over(state.lora.only("H"))

    def notes(self, state: State) -> dict[str, float]:
        return {"kept_rank": state.kept, "dropped_energy": state.dropped}
