"""FSLoRA: a client trains as many directions of the global adapter as its rank allows, drawn anew every round.

Fang et al., Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative Fine-Tuning of LLMs (2025),
https://arxiv.org/abs/2501.19389

    W + s B S_i A,   S_i = r/k_i diag(1 on I_i),   E[S_i] = 1,   then   A <- sum_i p_i A_i,   B <- sum_i p_i B_i

Row j of A and column j of B are trained by the clients whose I_i holds j, and stand as they were for the others, who
count in the mean all the same. Factors are averaged, so FedIT's error stays; k = r is FedIT. The paper weighs clients
alike: server.weights = uniform.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Strategy


class State(NamedTuple):
    """What the server keeps between rounds."""

    lora: LoRA
    round: int  # finished


@dataclass(frozen=True)
class FSLoRA(Strategy[State]):
    """Averages factors of which each client trains a sketch."""

    seed: int = 0  # of the sketches

    mixed_ranks = True
    sums_only = True
    continues = True
    up = down = "r * (d_in + d_out)"  # r is the client's own rank

    def init(self, lora: LoRA) -> State:
        return State(lora, 0)

    def client_init(self, state: State, client: Client) -> Job:
        draw = f"{self.seed}/{state.round}/{client.id}"
        ranks = {m: a.shape[0] for m, a in state.lora.A.items()}
        sketch = {
            m: sorted(Random(f"{draw}/{m}").sample(range(r), client.rank))  # the same for A and B
            for m, r in ranks.items()
            if client.rank < r
        }
        return Job(start=state.lora, sketch=sketch)

    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        return State(average(updates, weights), state.round + 1)

    def adapter(self, state: State) -> LoRA:
        return state.lora
