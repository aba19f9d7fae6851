"""Rounds played on random factors, for checks to look at."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedlora.lora import LoRA, Side
from fedlora.strategy import Strategy

from .random_clients import RANK, Clients, Work, aggregated, fresh, mean, wears

ALIKE = (RANK, RANK, RANK)
MIXED = tuple(range(1, RANK + 1))


class PlayedRound(NamedTuple):
    """A round that was played, with all there was before and after."""

    t: int
    clients: Clients
    state: Any
    work: list[Work]
    after: Any

    @property
    def updates(self) -> list[LoRA]:
        return [w.update for w in self.work]

    @property
    def weights(self) -> list[float]:
        return self.clients.weights

    @property
    def ideal(self) -> Side:
        """The weighted mean of the models that the clients trained, and of the heads that they shared."""
        return mean([{**w.model, **w.update.H} for w in self.work], self.weights)


def rounds(strategy: Strategy[Any], ranks: Sequence[int] = ALIKE, start: LoRA | None = None) -> Iterator[PlayedRound]:
    """Three rounds in a row, so that a rule which alternates shows all it does, from a fresh start or another."""
    clients = Clients(strategy, ranks)
    state = strategy.init(start or fresh())
    for t in range(3):
        work = clients.work(state, t)
        after = aggregated(strategy, state, work, clients.weights)
        yield PlayedRound(t, clients, state, work, after)
        state = after


def models(clients: Clients, state: Any) -> Side:
    """What every client would add to the pretrained weights at its next start, and its head."""
    seen: dict[str, Side] = {}
    for i in range(len(clients.ranks)):
        start, _ = wears(clients.job(state, i), clients.kept.get(i, LoRA()))
        seen[f"client {i}"] = {**clients.model(state, i), **start.H}
    return named(seen)


def trained(work: Sequence[Work]) -> Side:
    """The models that clients trained, named as `models` names them."""
    return named({f"client {i}": {**w.model, **w.trained.H} for i, w in enumerate(work)})


def spread(model: Side, clients: int) -> Side:
    """One model as that of every client, named as `models` names them."""
    return named({f"client {i}": model for i in range(clients)})


def named(models: dict[str, Side]) -> Side:
    """Several models as one set of matrices."""
    return {f"{m} of {whose}": t for whose, model in models.items() for m, t in model.items()}
