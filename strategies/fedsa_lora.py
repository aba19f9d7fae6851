"""FedSA-LoRA: A is shared and averaged; B and the head are trained too, and stay with their client.

Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning (ICLR 2025),
https://arxiv.org/abs/2410.01463

    A <- sum_i p_i A_i,   and client i computes with   W + s B_i A.

FedSA-rsLoRA is this with lora.rslora = true, FedSA-VeRA with lora.kind = vera, where side A is the vector d and side B
the vector b. A client that is not asked keeps a B made for an older A.

There is no global model: the server has A and B as it was before the first round, so `adapter` is no more than where
a new client starts. Set data.holdout to evaluate each client's own model on examples of its own, and take the
clients' adapters with `fedlora export --as per-client`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy


@dataclass(frozen=True)
class FedSALoRA(Strategy[LoRA]):
    """Averages A, and lets every client keep its B."""

    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * d_in"

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="ABH", shares="A")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        """The server's A with the initial B and head: where a client starts that has trained nothing yet."""
        return state
