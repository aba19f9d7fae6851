"""q-FFL: FedIT in which a client weighs the more, the higher its loss is, so that none falls behind.

Li et al., Fair Resource Allocation in Federated Learning (ICLR 2020), https://arxiv.org/abs/1905.10497

    minimise sum_i p_i F_i^(q+1) / (q + 1)   by q-FedAvg (Algorithm 2, divided by L), with d_i = x - y_i:
    x <- x - sum_i p_i F_i^q d_i / sum_i p_i (F_i^q + q L F_i^(q-1) |d_i|^2)

q = 0 is FedIT. L is 1/eta where clients take plain gradient steps. Under Adam, whose steps have a size of their own,
that L stops the model; L = 0, the default, leaves the mean weighted by losses, of the same direction. The paper's F_i
is client i's loss at x, here it is its mean over the round's training, which it tells anyway. Clients tell it
themselves: a loss counts as at most ten times the median of its round, and one that is not told as the median.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from fedlora.lora import LoRA, average, difference, euclidean_norm, map_factors
from fedlora.strategy import Client, Job, Sender, Strategy, declare

LEAST = 1e-10  # loss of which there are powers below 0
MOST = 10.0  # of the median


@dataclass(frozen=True)
class QFFL(Strategy[LoRA]):
    """Averages both factors, weighted by powers of the clients' losses."""

    q: float = 1.0
    lipschitz: float = 0.0  # L

    needs_senders = True
    needs_losses = True
    continues = True
    kinds = ("lora", "dora", "vera")
    up = down = "r * (d_in + d_out)"

    def __post_init__(self) -> None:
        if not (0 <= self.q <= 20 and self.lipschitz >= 0):
            raise ValueError(
                f"q = {self.q:g}, lipschitz = {self.lipschitz:g}: q lies in [0, 20], lipschitz is 0 or more"
            )
        if self.q and self.lipschitz:
            declare(self, self, continues=False)  # steps are shortened

    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state)

    def aggregate(
        self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> LoRA:
        losses = _bounded([sender.loss for sender in senders])
        by_loss = [p * F**self.q for p, F in zip(weights, losses, strict=True)]
        mean = average(updates, by_loss)
        curvature = sum(w / F * self._curvature(state, y) for w, F, y in zip(by_loss, losses, updates, strict=True))
        share = sum(by_loss) / (sum(by_loss) + curvature)

        def shortened(y: Tensor, x: Tensor) -> Tensor:
            return torch.lerp(x.to(y), y, share)

        return map_factors(shortened, mean, state) if curvature else mean

    def adapter(self, state: LoRA) -> LoRA:
        return state

    def _curvature(self, x: LoRA, y: LoRA) -> float:
        """q L |d|^2 of a client."""
        return self.q * self.lipschitz * euclidean_norm(difference(y, x)) ** 2 if self.lipschitz else 0.0


def _bounded(losses: Sequence[float | None]) -> list[float]:
    """The losses of a round's clients, none above ten times their median; the median of one that told none."""
    middle = max(median([loss for loss in losses if loss is not None] or [1.0]), LEAST)
    return [min(max(middle if loss is None else loss, LEAST), MOST * middle) for loss in losses]
