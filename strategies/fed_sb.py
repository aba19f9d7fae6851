"""Fed-SB: A and B are frozen frames; clients train and share the r x r core between them.

Singhal et al., Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated
LoRA Fine-Tuning (2025), https://arxiv.org/abs/2502.15436

    W + s B R A,   R <- sum_i p_i R_i,   so   sum_i p_i (B R_i A) = B R A   exactly.

The paper takes A and B from the singular vectors of a first update of full fine-tuning, which must come from public
data or be noised. Here A spans what the given A spans, and B is drawn from a seed; or, where the given B is not zero,
as with lora.init = pissa (principal directions of the weights), spans what that spans, and R starts at their product.
r^2 numbers carry little: it wants a larger rank than FedIT.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.lora import LoRA, average, factored, framed
from fedlora.strategy import Client, Job, Strategy


@dataclass(frozen=True)
class FedSB(Strategy[LoRA]):
    """Averages the core between frozen frames."""

    seed: int = 0  # of B, where the given one is zero

    exact = True
    sums_only = True
    continues = True
    up = down = "r * r"

    def init(self, lora: LoRA) -> LoRA:
        return framed(lora, f"fed_sb/{self.seed}")

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="RH", shares="RH")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        return factored(state)
