"""Capped offset: round any strategy, clients load the offset as one side adapter of limited rank.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (NeurIPS 2023), https://arxiv.org/abs/2305.14314, whose
quantised weights an offset cannot be added to: below half a step it would be rounded away.

    offset <- U_q S_q V_q^T,   U S V^T = the offset of the strategy   (Eckart-Young: none of rank q is nearer)

The strategy keeps its whole offset on the server and each round's is truncated anew, so that what was dropped once
can come back, and losses do not add up. Where nothing is dropped, what was exact is exact; `dropped` says how much is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, join, norm, truncate
from fedlora.strategy import HIGHEST_RANK, Client, Job, Sender, Strategy, declare, next_state


class State(NamedTuple):
    """What the server keeps between rounds."""

    inner: Any
    part: LoRA
    dropped: float  # share of the offset's squared Frobenius norm


@dataclass(frozen=True)
class Capped(Strategy[State]):
    """Wraps a strategy so that its offset has a limited rank."""

    inner: Strategy[Any]
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise StrategyError(f"an offset of rank {self.rank} holds nothing; give a rank of 1 or more")
        declare(self, self.inner, exact=False, down="")  # down: the strategy's own has its whole offset in it

    def init(self, lora: LoRA) -> State:
        return self._capped(self.inner.init(lora))

    def client_init(self, state: State, client: Client) -> Job:
        job, full = self.inner.client_init(state.inner, client), self.inner.client_init(state.inner, HIGHEST_RANK)
        own = join(*(part for part in job.offset if all(part is not common for common in full.offset)))
        part = truncate(join(state.part, own), self.rank) if own else state.part  # of a lower rank, with what it lacks
        return replace(job, offset=(part,) if part else ())

    def aggregate(
        self, state: State, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> State:
        return self._capped(next_state(self.inner, state.inner, updates, weights, senders))

    def adapter(self, state: State) -> LoRA:
        job = self.inner.client_init(state.inner, HIGHEST_RANK)
        # a client that resumes loads the offset less the product it goes on from: the offset is the whole model
        start = LoRA() if job.resumes and state.part else job.start
        return join(state.part, start).over(self.inner.adapter(state.inner).only("H"))

    def notes(self, state: State) -> Mapping[str, float]:
        rank = max((a.shape[0] for a in state.part.A.values()), default=0)
        return {**self.inner.notes(state.inner), "offset_rank": rank, "dropped": state.dropped}

    def _capped(self, inner: Any) -> State:
        whole = join(*self.inner.client_init(inner, HIGHEST_RANK).offset)
        part, size = truncate(whole, self.rank), norm(whole)
        return State(inner, part, max(0.0, 1 - (norm(part) / size) ** 2) if size else 0.0)
