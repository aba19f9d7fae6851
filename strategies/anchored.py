"""Anchored start: round any strategy, a start whose product is not zero leaves the pretrained model as it was.

Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models (NeurIPS 2024),
https://arxiv.org/abs/2404.02948; Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (2024),
https://arxiv.org/abs/2406.01775

    W + s B A   becomes   (W - s B_0 A_0) + s B A

Both papers change W; here -B_0 A_0 is one more part of the offset, which clients get once. All stays a sum, so that
what was exact is exact. Clients of low rank would start from a piece of B_0 A_0 and lose the rest: ranks are one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fedlora.lora import LoRA, factored, join
from fedlora.strategy import Client, Job, Sender, Strategy, declare, next_state


class State(NamedTuple):
    """What the server keeps between rounds."""

    anchor: LoRA  # minus the product of the start; without the modules where that is zero
    inner: Any


@dataclass(frozen=True)
class Anchored(Strategy[State]):
    """Wraps a strategy so that a start whose product is not zero leaves the pretrained model as it was."""

    inner: Strategy[Any]

    def __post_init__(self) -> None:
        declare(self, self.inner, mixed_ranks=False, kinds=("lora",))  # DoRA rescales what an offset adds to

    def init(self, lora: LoRA) -> State:
        state = self.inner.init(lora)
        start = factored(self.inner.adapter(state))  # the strategy's own: it may not start from what it was given
        moved = [m for m, b in start.B.items() if b.any()]
        return State(LoRA({m: start.A[m] for m in moved}, {m: -start.B[m] for m in moved}), state)

    def client_init(self, state: State, client: Client) -> Job:
        job = self.inner.client_init(state.inner, client)
        return replace(job, offset=(state.anchor, *job.offset)) if state.anchor else job

    def aggregate(
        self, state: State, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> State:
        return State(state.anchor, next_state(self.inner, state.inner, updates, weights, senders))

    def adapter(self, state: State) -> LoRA:
        whole = self.inner.adapter(state.inner)
        return join(state.anchor, whole).over(whole.only("H")) if state.anchor else whole

    def notes(self, state: State) -> Mapping[str, float]:
        return self.inner.notes(state.inner)
