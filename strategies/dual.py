"""Dual adapters: one adapter of which the last rows of the rank never leave their client.

Yang et al., Dual-Personalizing Adapter for Federated Foundation Models (FedDPA, NeurIPS 2024),
https://arxiv.org/abs/2403.19211
Qi et al., FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA Tuning (2024),
https://arxiv.org/abs/2406.07925

    client k computes with   W + s (B A + B_k A_k);   A <- sum_i p_i A_i,   B <- sum_i p_i B_i

[B | B_k] [A; A_k] is one adapter: of rank r, the last `local` rows of A and columns of B are the client's own. All are
trained together, as in FDLoRA. A client that is not asked keeps its rows, and a new one has B_k = 0: the common model.

FedDPA's code looks for a client's own adapter in the folder of the round before, so that one round of sleep starts a
new one, and weighs the two by an example's likeness to the client's, which no adapter file can say (a constant weight
is a learning rate). A copy of others adds the factors, (B + B_k)(A + A_k), which is another model. s is alpha / r with
r the whole rank: compare runs at equal s. Under DP-SGD what stays is clipped and noised with what is sent: rows without
noise in the same forward pass would let one record move the others' gradients (9 C where C is promised).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, append_rank, average, split_rank
from fedlora.strategy import Client, Job, Strategy


@dataclass(frozen=True)
class Dual(Strategy[LoRA]):
    """Averages all rows of the rank but the last ones, which stay with their client."""

    sums_only = True
    continues = True
    kinds = ("lora", "dora")
    up = "(r - l) * (d_in + d_out)"
    down = "r * (d_in + d_out)"

    local: int = 1

    def __post_init__(self) -> None:
        if self.local < 0:
            raise StrategyError(f"dual keeps local = {self.local} rows of the rank with each client; take 0 or more")

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, keeps_rank=self.local)

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        rows = split_rank(state.only("AB"), self.local)[1]  # the first start's own: nobody has sent any
        return append_rank(average(updates, weights), rows)

    def adapter(self, state: LoRA) -> LoRA:
        """The shared rows with those of the first start behind: where a client starts that has trained nothing yet."""
        return state
