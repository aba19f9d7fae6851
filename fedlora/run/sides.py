"""The sides of the adapter that a strategy may ever have trained, and sent back: its rounds are played beforehand."""

from typing import Any

import torch

from fedlora.lora import SIDES, LoRA
from fedlora.strategy import Client, Sender, Strategy, next_state

FEWEST_ROUNDS, MOST_ROUNDS = 4, 100  # that are played: a run of one round may be resumed to more
EVERY = "".join(side for side in SIDES if side != "D")


def sides(strategy: Strategy[Any], rounds: int = MOST_ROUNDS) -> tuple[str, str]:
    """The sides that clients train and those that they send, in any of a run's rounds, by their letters.

    A job that asks for another side is refused by the clients that agreed to these: so is one of a strategy that
    first changes its sides after `MOST_ROUNDS`, or that chooses them by what the clients' real factors are. A strategy
    that fails on the made-up factors, as one of a user's own may, is taken to want every side.
    """
    try:
        played = _play(strategy, min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS))
    except Exception:  # whatever a user's strategy raises
        return EVERY, EVERY
    return played


def kept_sides(strategy: Strategy[Any], start: LoRA, rounds: int = MOST_ROUNDS) -> str:
    """The sides that clients train and never send, by their letters: with any, the clients have no common model.

    `start` is the run's adapter; a side that it has not is not counted.
    """
    trained, shared = sides(strategy, rounds)
    return "".join(side for side in trained if side not in shared and start.side(side))


def _play(strategy: Strategy[Any], rounds: int) -> tuple[str, str]:
    """The union of the sides of so many rounds' jobs, on an adapter with one small module."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    state = strategy.init(LoRA({"m": a}, {"m": b}, {"head": torch.ones(2)}))
    trained, shared = set[str](), set[str]()
    for _ in range(rounds):
        job = strategy.client_init(state, Client(id=0, examples=1, rank=2))
        trained |= {*job.trains}
        shared |= {*job.shares}
        update = job.start.only(job.shares)
        state = next_state(strategy, state, [update, update], [1.0, 1.0], [Sender(0, 1), Sender(1, 1)])
    return _ordered(trained), _ordered(shared)


def _ordered(letters: set[str]) -> str:
    return "".join(side for side in SIDES if side in letters)
