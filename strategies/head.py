"""Head: round any strategy, whether a classifier's head is trained by all, by each client for itself, or by none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedlora.lora import LoRA
from fedlora.strategy import Client, Job, Sender, Strategy, declare, next_state


@dataclass(frozen=True)
class Head(Strategy[Any]):
    """Wraps a strategy so that heads stay with their clients, or as they were."""

    inner: Strategy[Any]
    policy: Literal["local", "frozen"]

    def __post_init__(self) -> None:
        declare(self, self.inner)

    def init(self, lora: LoRA) -> Any:
        return self.inner.init(lora)

    def client_init(self, state: Any, client: Client) -> Job:
        job = self.inner.client_init(state, client)
        shares = job.shares.replace("H", "")
        if self.policy == "local":
            return replace(job, shares=shares)
        turns = tuple(turn.replace("H", "") for turn in job.turns if turn != "H")
        trains = job.trains.replace("H", "")
        return replace(job, trains=trains, turns=turns, shares=shares, correction=job.correction.only(trains))

    def aggregate(
        self, state: Any, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> Any:
        head = self.inner.adapter(state).only("H")  # nobody sent one: the strategy sees it unchanged
        return next_state(self.inner, state, [u.over(head) for u in updates], weights, senders)

    def adapter(self, state: Any) -> LoRA:
        return self.inner.adapter(state)

    def notes(self, state: Any) -> Mapping[str, float]:
        return self.inner.notes(state)
