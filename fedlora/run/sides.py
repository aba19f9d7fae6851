"""The sides of the adapter that a strategy may ever have trained, and sent back: its rounds are played beforehand."""

from contextlib import suppress
from typing import Any, NamedTuple

import torch

from fedlora.jobs import sent_sides, shared_start
from fedlora.log_lines import counted
from fedlora.lora import SIDES, LoRA
from fedlora.strategy import Client, Sender, Strategy, next_state

FEWEST_ROUNDS, MOST_ROUNDS = 4, 100  # that are played: a run of one round may be resumed to more
RANK = 2  # of the made-up factors
EVERY = "".join(side for side in SIDES if side != "D")


class AskedOfClients(NamedTuple):
    """What a run may ever ask of its clients."""

    trains: str  # letters of sides
    shares: str
    keeps_rank: int  # rows of the rank that are never sent


def sides(strategy: Strategy[Any], rounds: int = MOST_ROUNDS, rank: int = RANK) -> tuple[str, str]:
    """The sides that clients train and those that they send, in any of a run's rounds, by their letters.

    As `asked_of_clients` has them.
    """
    return asked_of_clients(strategy, rounds, rank)[:2]


def asked_of_clients(strategy: Strategy[Any], rounds: int = MOST_ROUNDS, rank: int = RANK) -> AskedOfClients:
    """The sides that clients train and those that they send, in any of a run's rounds, and the rows that always stay.

    A job that asks for another side is refused by the clients that agreed to these: so is one of a strategy that
    first changes its sides after `MOST_ROUNDS`, or that chooses them by what the clients' real factors are. A strategy
    that fails on made-up factors, of a low rank and of the run's own `rank`, as one of a user's may, is taken to want
    every side.
    """
    for own in dict.fromkeys((RANK, rank)):
        with suppress(Exception):  # whatever a user's strategy raises
            return _play(strategy, min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS), own)
    return AskedOfClients(EVERY, EVERY, 0)


def kept_by_clients(strategy: Strategy[Any], start: LoRA, rounds: int = MOST_ROUNDS) -> list[str]:
    """What clients train and never send, each in words: with any, the clients have no common model.

    `start` is the run's adapter; a side that it has not is not counted.
    """
    trains, shares, rows = asked_of_clients(strategy, rounds)
    sides = ["the head" if s == "H" else f"side {s}" for s in trains if s not in shares and start.side(s)]
    return [*sides, f"the last {counted(rows, 'row')} of the rank"] if rows else sides


def _play(strategy: Strategy[Any], rounds: int, rank: int) -> AskedOfClients:
    """The union of the sides of so many rounds' jobs, on an adapter of this rank with one small module."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 3 * rank, generator=generator), torch.randn(2 * rank + 1, rank, generator=generator)
    state = strategy.init(LoRA({"m": a}, {"m": b}, {"head": torch.ones(2)}))
    trained, shared, rows = set[str](), set[str](), list[int]()
    for _ in range(rounds * strategy.exchanges):
        job = strategy.client_init(state, Client(id=0, examples=1, rank=rank))
        trained |= {*job.trains}
        shared |= {*sent_sides(job)}
        rows.append(job.keeps_rank)
        update = shared_start(job)
        state = next_state(strategy, state, [update, update], [1.0, 1.0], [Sender(0, 1), Sender(1, 1)])
    return AskedOfClients(_ordered(trained), _ordered(shared), min(rows))


def _ordered(letters: set[str]) -> str:
    return "".join(side for side in SIDES if side in letters)
