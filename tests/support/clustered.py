"""Clustered: clients in clusters, each with a FedAvg of its own, which must know who sent what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.lora import LoRA, average
from fedlora.strategy import Client, Job, Sender, Strategy


class State(NamedTuple):
    clusters: tuple[LoRA, ...]
    losses: dict[int, float]  # client -> the training loss that it told last
    scores: dict[int, Mapping[str, float]]  # client -> its held-out scores, as they were told last


@dataclass(frozen=True)
class Clustered(Strategy[State]):
    number: int = 2  # of clusters; client i is in cluster i mod number

    needs_senders = True
    continues = True
    up = down = "r * (d_in + d_out)"

    def init(self, lora: LoRA) -> State:
        return State((lora,) * self.number, {}, {})

    def client_init(self, state: State, client: Client) -> Job:
        return Job(start=state.clusters[client.id % self.number])

    def aggregate(
        self, state: State, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> State:
        clusters = list(state.clusters)
        for k in range(self.number):
            here = [j for j, sender in enumerate(senders) if sender.id % self.number == k]
            if here:
                clusters[k] = average([updates[j] for j in here], [weights[j] for j in here])
        losses = {s.id: s.loss for s in senders if s.loss is not None}
        scores = {s.id: s.metrics for s in senders}
        return State(tuple(clusters), {**state.losses, **losses}, {**state.scores, **scores})

    def adapter(self, state: State) -> LoRA:
        return average(state.clusters, [1.0] * self.number)
