"""Which client trains at which rank, written as one of

(nothing)                all at lora.rank
4,8,16                   dealt in turn
uniform:4-16             drawn, every rank from 4 to 16 alike
weighted:4=0.5,16=0.2    drawn by these weights
auto:4GB,500MB           memory budgets dealt in turn: the largest rank whose training fits
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random

from fedlora.errors import ConfigError, nearest
from fedlora.seeds import derive

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True, eq=False)
class RankSpec:
    """A spec of the clients' ranks, and what it takes to give each client its own."""

    spec: str
    largest: int  # lora.rank
    clients: int
    seed: int
    memory: Callable[[int], int]  # bytes that training takes, by rank

    @property
    def parameter(self) -> str:
        """The part of the spec behind its colon, or all of it where there is none."""
        return self.spec.rpartition(":")[2]

    @property
    def words(self) -> list[str]:
        """The words of the parameter, which commas part."""
        return [word.strip() for word in self.parameter.split(",")]

    def wrong(self, takes: str) -> ConfigError:
        """The error to raise for this spec; `takes` says what is wrong and what to write."""
        return ConfigError(f'lora.ranks = "{self.spec}": {takes}')

    def rank(self, word: str) -> int:
        """The rank that a word writes; raises `ConfigError` where it is none from 1 to the largest."""
        if not word.strip().isdecimal():
            raise self.wrong(f'"{word}" is no rank; write whole numbers, as in 4,8,16')
        if not 1 <= int(word) <= self.largest:
            raise self.wrong(
                f"rank {int(word)} is not in 1 to lora.rank = {self.largest}; change it, or raise lora.rank"
            )
        return int(word)

    def dealt(self, given: list[int]) -> list[int]:
        """The ranks dealt to the clients in turn, from the first again where there are more clients."""
        if len(given) > self.clients:
            raise self.wrong(f"{len(given)} are more than the {self.clients} clients there are; leave some out")
        return [given[i % len(given)] for i in range(self.clients)]

    def drawn(self, weights: dict[int, float]) -> list[int]:
        """A rank drawn for every client, which does not depend on how many other clients there are."""
        choices, p = list(weights), list(weights.values())
        return [Random(derive(self.seed, "rank", i)).choices(choices, p)[0] for i in range(self.clients)]


def ranks(spec: str, *, largest: int, clients: int, seed: int, memory: Callable[[int], int]) -> list[int]:
    """The rank of every client, in 1..largest; `spec` is as in the head of this module.

    `memory(rank)` is what training at a rank takes, in bytes, and does not fall with the rank. Raises `ConfigError` for
    a spec that is not one, a rank above `largest`, and a budget that not even rank 1 fits.
    """
    draw = RankSpec(spec.strip(), largest=largest, clients=clients, seed=seed, memory=memory)
    name, colon, _ = draw.spec.partition(":")
    if not draw.spec:
        return [largest] * clients
    if not colon:
        return draw.dealt([draw.rank(word) for word in draw.words])
    if name not in SPECS:
        raise draw.wrong(f'there is no "{name}"; {nearest(name, SPECS)}; or write ranks alone, as in 4,8,16')
    return SPECS[name](draw)


def listed(spec: str) -> set[int]:
    """The ranks that a spec deals in turn, known without a model; none of one that draws them or fits them."""
    words = [] if ":" in spec else spec.split(",")
    return {int(word) for word in map(str.strip, words) if word.isdecimal()}


def _uniform(draw: RankSpec) -> list[int]:
    low, dash, high = draw.parameter.partition("-")
    if not dash:
        raise draw.wrong("uniform takes two ranks, as in uniform:4-16")
    first, last = draw.rank(low), draw.rank(high)
    if first > last:
        raise draw.wrong(f"{first} is above {last}; write the lower rank first")
    return draw.drawn(dict.fromkeys(range(first, last + 1), 1.0))


def _weighted(draw: RankSpec) -> list[int]:
    weights: dict[int, float] = {}
    for word in draw.words:
        rank, _, weight = word.partition("=")
        value = _number(weight)
        if not 0 < value < inf:
            raise draw.wrong(f'"{word}" is no rank with a weight above 0; write it as in weighted:4=0.5,16=0.2')
        if draw.rank(rank) in weights:
            raise draw.wrong(f"rank {draw.rank(rank)} has two weights; give it one")
        weights[draw.rank(rank)] = value
    return draw.drawn(weights)


def _auto(draw: RankSpec) -> list[int]:
    return draw.dealt([_fitting(draw, word) for word in draw.words])


def _fitting(draw: RankSpec, word: str) -> int:
    """The largest rank whose training fits a budget such as 4GB, found by bisection."""
    budget = _number(word[:-2]) * UNITS.get(word[-2:].upper(), 0.0)
    if not 0 < budget < inf:
        raise draw.wrong(f'"{word}" is no amount of memory; write it as in auto:4GB,500MB')
    if draw.memory(1) > budget:
        need = f"{draw.memory(1) / 1e6:,.1f} MB, and {word} is {budget / 1e6:,.1f} MB"
        raise draw.wrong(f"training at rank 1 takes about {need}; give more, or a smaller train.batch_size")
    fits, least_not = 1, draw.largest + 1
    while least_not - fits > 1:
        middle = (fits + least_not) // 2
        fits, least_not = (middle, least_not) if draw.memory(middle) <= budget else (fits, middle)
    return fits


def _number(text: str) -> float:
    """The positive number that a text writes, or 0 where it writes none."""
    try:
        return max(float(text), 0.0)
    except ValueError:
        return 0.0


SPECS: dict[str, Callable[[RankSpec], list[int]]] = {"uniform": _uniform, "weighted": _weighted, "auto": _auto}
