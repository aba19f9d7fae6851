"""Rounds played on random factors, for checks to look at."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedlora.lora import LoRA, Side
from fedlora.strategy import Strategy

from .random_clients import RANK, Clients, Work, aggregated, fresh, mean

ALIKE = (RANK, RANK, RANK)
MIXED = tuple(range(1, RANK + 1))


class PlayedRound(NamedTuple):
    """A round that was played, with the state before and the state after."""

    t: int
    clients: Clients
    state: Any
    work: list[Work]
    after: Any

    @property
    def updates(self) -> list[LoRA]:
        """The clients' updates."""
        return [w.update for w in self.work]

    @property
    def weights(self) -> list[float]:
        """The clients' weights."""
        return self.clients.weights

    @property
    def ideal(self) -> Side:
        """The weighted mean of the models that the clients trained, and of the heads that they shared."""
        return mean([{**w.model, **w.update.H} for w in self.work], self.weights)

    @property
    def ideal_for_all(self) -> Side:
        """That mean as the model of every client, named as `models` names them."""
        return by_client([self.ideal] * len(self.work))

    @property
    def models(self) -> Side:
        """The clients' models after the round, named as `models` names them."""
        return models(self.clients, self.after)

    def aggregated(self, work: Sequence[Work], weights: Sequence[float]) -> Any:
        """The state after the round if this work had come in it, with these weights."""
        return aggregated(self.clients.strategy, self.state, work, weights)

    def models_from(self, work: Sequence[Work], weights: Sequence[float]) -> Side:
        """The clients' models after the round if this work had come in it, with these weights."""
        return models(self.clients, self.aggregated(work, weights))


def rounds(strategy: Strategy[Any], ranks: Sequence[int] = ALIKE, start: LoRA | None = None) -> Iterator[PlayedRound]:
    """Three rounds from a fresh adapter or from `start`; three, so that a rule which alternates shows all it does."""
    clients = Clients(strategy, ranks)
    state = strategy.init(start or fresh())
    for t in range(3):
        work = clients.work(state, t)
        after = aggregated(strategy, state, work, clients.weights)
        yield PlayedRound(t, clients, state, work, after)
        state = after


def models(clients: Clients, state: Any) -> Side:
    """What every client would add to the pretrained weights at its next start, and its head: `up of client 0`, ..."""
    return by_client([{**clients.model(state, i), **clients.start(state, i).H} for i in range(len(clients.ranks))])


def trained(work: Sequence[Work]) -> Side:
    """The models that clients trained, named as `models` names them."""
    return by_client([{**w.model, **w.trained.H} for w in work])


def by_client(models: Sequence[Side]) -> Side:
    """The models of clients 0, 1, ... as one set of matrices."""
    return {f"{m} of client {i}": t for i, model in enumerate(models) for m, t in model.items()}
