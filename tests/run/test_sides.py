"""What a strategy's jobs may train and send is known before a run, so that clients can agree to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from fedlora.lora import LoRA
from fedlora.run.sides import asked_of_clients, kept_by_clients, sides
from fedlora.strategies.head import Head
from fedlora.strategy import Client, Job, Strategy, catalogue, load


@pytest.mark.parametrize(
    ("name", "found"),
    [("fedavg", ("ABH", "ABH")), ("fedsa_lora", ("ABH", "A")), ("ffa_lora", ("BH", "BH")), ("fed_sb", ("RH", "RH"))],
)
def test_the_sides_are_those_of_the_paper(name: str, found: tuple[str, str]) -> None:
    assert sides(load(name)) == found


def test_a_strategy_that_takes_turns_wants_the_sides_of_all_turns() -> None:
    assert sides(load("rolora")) == ("ABH", "ABH")
    assert sides(load("rolora"), rounds=1) == ("ABH", "ABH")  # it may be resumed to more


@pytest.mark.parametrize("entry", catalogue(), ids=lambda e: e.name)
def test_they_hold_those_of_the_first_round(entry: object) -> None:
    trains, shares = sides(entry.default)  # type: ignore[attr-defined]
    first = entry.sides  # type: ignore[attr-defined]
    assert {*first[0]} <= {*trains} and {*first[1]} <= {*shares}


@dataclass(frozen=True)
class HeadLast(Strategy[int]):
    """It trains A and B for nine rounds and the head from then on, as a user's own may."""

    def init(self, lora: LoRA) -> int:
        return 0

    def client_init(self, state: int, client: Client) -> Job:
        sides = "AB" if state < 9 else "H"
        return Job(self.adapter(state), trains=sides, shares=sides)

    def aggregate(self, state: int, updates: Sequence[LoRA], weights: Sequence[float]) -> int:
        return state + 1

    def adapter(self, state: int) -> LoRA:
        return LoRA({"m": torch.ones(2, 6)}, {"m": torch.ones(5, 2)}, {"head": torch.ones(2)})


@pytest.mark.parametrize(("rounds", "found"), [(9, "AB"), (10, "ABH")])
def test_turns_of_many_rounds_are_seen_as_far_as_the_run_goes(rounds: int, found: str) -> None:
    assert sides(HeadLast(), rounds) == (found, found)


@dataclass(frozen=True)
class Picky(Strategy[LoRA]):
    """It knows one model's modules, as a user's own may."""

    def init(self, lora: LoRA) -> LoRA:
        return LoRA({"q": lora.A["q"]})

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(state)

    def aggregate(self, state: LoRA, updates: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
        return state

    def adapter(self, state: LoRA) -> LoRA:
        return state


def test_a_strategy_that_fails_on_made_up_factors_is_taken_to_want_every_side() -> None:
    assert sides(Picky()) == ("ABRH", "ABRH")


def test_a_strategy_that_takes_no_such_low_rank_is_asked_at_the_runs_own() -> None:
    four = load("ravan", heads=4)
    assert sides(four, rank=8) == ("RH", "RH") and sides(four, rank=6) == ("ABRH", "ABRH")


def test_what_clients_train_and_never_send_they_keep() -> None:
    start = LoRA({"m": torch.ones(2, 6)}, {"m": torch.ones(5, 2)})  # of a model without a head
    kept = {entry.name: kept_by_clients(entry.default, start) for entry in catalogue()}
    personal = {"fedsa_lora": ["side B"], "dual": ["the last 1 row of the rank"]}
    assert {name: words for name, words in kept.items() if words} == personal
    assert kept_by_clients(Head(load("fedavg"), "local"), replace(start, H={"h": torch.ones(1)})) == ["the head"]
    assert asked_of_clients(load("dual", local=5)) == ("ABH", "ABH", 5)  # whatever the rank that is played with
