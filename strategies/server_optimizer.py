"""FedOpt: round any strategy, the server steps by an optimiser whose gradient is what the clients' mean moved.

Reddi et al., Adaptive Federated Optimization (ICLR 2021), https://arxiv.org/abs/2003.00295
Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification (2019),
https://arxiv.org/abs/1909.06335 (momentum)

    D = sum_i p_i (x_i - x)                                  x: where the round started, x_i: client i's update
    momentum   m <- b1 m + D,             step = lr m
    the others m <- b1 m + (1 - b1) D,    step = lr m / (sqrt(v) + tau),   v from tau^2
    adagrad    v <- v + D^2
    adam       v <- b2 v + (1 - b2) D^2
    yogi       v <- v - (1 - b2) D^2 sign(v - D^2)

Every update is shifted by step - D before the strategy sees it: their mean has moved by the step, and what clients
differ by (FedEx's residual) stays. With adam, yogi and adagrad a coordinate moves by about lr a round: 1e-3 to 1e-1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, average, map_factors
from fedlora.strategy import HIGHEST_RANK, Client, Job, Sender, Strategy, declare, next_state, shared_start


class State(NamedTuple):
    """What the server keeps between rounds."""

    inner: Any
    m: LoRA  # first moments, of the sides that have been shared so far
    v: LoRA  # second moments; none with momentum


@dataclass(frozen=True)
class ServerOptimizer(Strategy[State]):
    """Wraps a strategy so that the server steps by an optimiser."""

    inner: Strategy[Any]
    kind: Literal["momentum", "adam", "yogi", "adagrad"]
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if not self.inner.continues:
            raise StrategyError(
                f"a server optimiser has no meaning round {type(self.inner).__name__}, which starts anew or changes "
                "basis every round, so that no coordinate is the same in two: take fedavg, ffa_lora or fedex_lora"
            )
        if self.inner.exchanges > 1:
            raise StrategyError(
                f"a server optimiser has no meaning round {type(self.inner).__name__}, whose clients send projections "
                "in two passes, and no step: take fedavg, ffa_lora or fedex_lora"
            )
        declare(self, self.inner, exact=False, continues=False)

    def init(self, lora: LoRA) -> State:
        state = self.inner.init(lora)
        if self.inner.client_init(state, HIGHEST_RANK).correction:
            raise StrategyError(
                f"a server optimiser has no meaning round {type(self.inner).__name__}, which reads every client's "
                "gradients off its update, and would read its own steps with them: leave aggregate.optimizer out"
            )
        low, full = (self.inner.client_init(state, Client(0, 1, rank)).start for rank in (1, HIGHEST_RANK.rank))
        if any(a.shape != full.A[m].shape for m, a in low.A.items()):
            raise StrategyError(
                f"{type(self.inner).__name__} sends clients of low rank less than the whole adapter, so that their "
                "updates have no common step for a server optimiser: give all clients lora.rank, or take fslora"
            )
        return State(state, LoRA(), LoRA())

    def client_init(self, state: State, client: Client) -> Job:
        return self.inner.client_init(state.inner, client)

    def aggregate(
        self, state: State, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> State:
        x = shared_start(self.inner.client_init(state.inner, HIGHEST_RANK))
        D = map_factors(lambda x, mean: mean - x, x, average(updates, weights))
        m = map_factors(self._first_moment, D, state.m.over(map_factors(torch.zeros_like, D)))
        v = map_factors(self._second_moment, D, state.v.over(map_factors(lambda d: torch.full_like(d, self.tau**2), D)))
        shift = map_factors(lambda d, m, v: self._step(m, v) - d, D, m, v)
        shifted = [map_factors(torch.add, shift, u).over(u) for u in updates]
        kept = LoRA() if self.kind == "momentum" else v.over(state.v)
        return State(next_state(self.inner, state.inner, shifted, weights, senders), m.over(state.m), kept)

    def adapter(self, state: State) -> LoRA:
        return self.inner.adapter(state.inner)

    def notes(self, state: State) -> Mapping[str, float]:
        return self.inner.notes(state.inner)

    def _first_moment(self, d: Tensor, m: Tensor) -> Tensor:
        return self.beta1 * m + (d if self.kind == "momentum" else (1 - self.beta1) * d)

    def _second_moment(self, d: Tensor, v: Tensor) -> Tensor:
        if self.kind == "adagrad":
            return v + d**2
        if self.kind == "yogi":
            return v - (1 - self.beta2) * d**2 * torch.sign(v - d**2)
        return self.beta2 * v + (1 - self.beta2) * d**2

    def _step(self, m: Tensor, v: Tensor) -> Tensor:
        return self.lr * m if self.kind == "momentum" else self.lr * m / (v.sqrt() + self.tau)
