"""RAVAN: A and B are frozen frames in heads; clients train and share a small core a head, with a scale.

Raje et al., Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning (NeurIPS 2025),
https://arxiv.org/abs/2506.05568

    W + s sum_i c_i B_i H_i A_i        head i of h: B_i (d_out, k), H_i (k, k), A_i (k, d_in), h k = r = lora.rank
    client: train H_i and c_i from c_i = 1, send c_i H_i;     H_i <- sum_j p_j c_ij H_ij,  c_i <- 1

This is Fed-SB with the core B blockdiag(H_1, ..., H_h) A, for r^2 / h numbers: a rank of sqrt(h) times Fed-SB's at the
same cost; one head without scales is Fed-SB, bit for bit. The mean is of c_i H_i, and exact: means of scales and of
heads apart would miss it. To first order a scale makes a step's part along H_i 1 + |H_i|^2 times as long.
Frames are Fed-SB's, orthonormal over all r rows, so that no head sees what another spans. Third-party code draws them
unscaled, which makes a core's gradient about d_in times as large, and leaves s out. A given B that is not zero gives
the blocks on its core's diagonal: all of PiSSA's start, a part of OLoRA's. Clients that train some heads only are not
built. Under DP-SGD scales stay 1: the noise of a scale would multiply that of its head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, average, factored, framed
from fedlora.strategy import Client, Job, Strategy, declare


@dataclass(frozen=True)
class Ravan(Strategy[LoRA]):
    """Averages the cores of several heads between frozen frames."""

    heads: int = 2  # h, which divides the rank
    scales: bool = True  # train them too, as the paper does?
    seed: int = 0  # of B, where the given one is zero

    exact = True
    sums_only = True
    continues = True

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise StrategyError(f"heads = {self.heads}: an adapter has one at least; set 1 or more")
        declare(self, self, up=f"r * r / {self.heads}", down=f"r * r / {self.heads}")

    def init(self, lora: LoRA) -> LoRA:
        whole = framed(lora, f"fed_sb/{self.seed}")
        return replace(whole, R={m: self._in_heads(m, core) for m, core in whole.R.items()})

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state, trains="RH", shares="RH", scales=self.scales)

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return average(updates, weights).over(state)

    def adapter(self, state: LoRA) -> LoRA:
        return factored(state)

    def _in_heads(self, module: str, core: Tensor) -> Tensor:
        """The blocks on the diagonal of a core (r, r): (h, k, k); the core itself of one head."""
        if len(core) % self.heads:
            raise StrategyError(
                f"heads = {self.heads} do not divide the rank {len(core)} of {module}; choose heads that do, or "
                "another lora.rank"
            )
        k = len(core) // self.heads
        blocks = [core[i : i + k, i : i + k] for i in range(0, len(core), k)]
        return core if self.heads == 1 else torch.stack(blocks)
