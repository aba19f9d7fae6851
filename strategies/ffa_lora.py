"""FFA-LoRA: A is frozen at its random start; only B is trained, shared and averaged.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning (ICLR 2024), https://arxiv.org/abs/2403.12313

    B <- sum_i p_i B_i,   so   sum_i p_i (B_i A) = B A   exactly.

It wants a larger learning rate than FedIT: PEFT's random A has A A^T of about I/3, and nothing makes it grow. With
`orthonormal` A is Q^T of A^T = Q T, so A A^T = I: SGD at some rate and clip then does about what it does with PEFT's A
at three times that rate and 0.58 times that clip, so compare the two at rates tuned apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.lora import LoRA, average, orthonormal
from fedlora.strategy import Client, Job, Strategy, declare


@dataclass(frozen=True)
class FFALoRA(Strategy[LoRA]):
    """Averages B over a frozen A."""

    orthonormal: bool = False  # rows of A orthonormal from the start, spanning what they spanned

    exact = True
    sums_only = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * d_out"

    def __post_init__(self) -> None:
        if self.orthonormal:
            declare(self, self, kinds=("lora", "dora"))  # VeRA's side A is a vector

    def init(self, lora: LoRA) -> LoRA:
        return orthonormal(lora) if self.orthonormal else lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="BH", shares="BH")

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        return state
