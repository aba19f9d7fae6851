"""The mistakes that are made in a first strategy: `fedlora check` names the cause, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.checks.contract import CHECKS, CheckResult, most_likely, run, verify
from fedlora.checks.on_small_models import (
    check_a_client_that_slept_computes_with_the_model,
    check_it_works_with_the_kinds_it_declares,
    check_numbers_sent_are_as_declared,
    check_what_trains_moves_and_nothing_else,
)
from fedlora.checks.report import check as report
from fedlora.lora import LoRA, average, map_factors
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategies.fedex_lora import FedEx
from fedlora.strategy import Client, Job, Strategy, load
from tests.support.bugs import CountsOnItself, FedExSaysDora, FedExSaysLittleIsSent, TransposesB, WeighsAllAlike

Updates = Sequence[LoRA]
Weights = Sequence[float]
ON_RANDOM_FACTORS = [check for check in CHECKS if not check.__module__.endswith("on_small_models")]


def said_of(strategy: Strategy[Any]) -> tuple[list[CheckResult], str]:
    """What fails of the checks without a model, and what is most likely."""
    results = [verify(check, strategy) for check in ON_RANDOM_FACTORS]
    return [result for result in results if result.outcome == "failed"], most_likely(results)


class ExchangesTheFactors(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        mean = average(updates, weights)
        return LoRA(A=mean.B, B=mean.A, H=mean.H)


class ForgetsTheHead(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        mean = average(updates, weights)
        return LoRA(mean.A, mean.B)


class DividesByZero(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return map_factors(lambda t: t * float("nan"), average(updates, weights))


class AddsToTheState(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        for s, m, t in average(updates, weights).matrices():
            state.side(s)[m].add_(t)
        return state


@dataclass(frozen=True)
class KeepsMomentum(FedAvg):
    momentum: dict[str, LoRA] = field(default_factory=dict)

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        before = self.momentum.get("last", state)
        self.momentum["last"] = average([average(updates, weights), before], [0.5, 0.5])
        return self.momentum["last"]


class DrawsUnseeded(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return map_factors(lambda t: t + torch.randn_like(t), average(updates, weights))


class IsNoDataclass(Strategy[LoRA]):
    def init(self, lora: LoRA) -> LoRA:
        return lora

    def client_init(self, state: LoRA, client: Client) -> Job:
        return Job(start=state)

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return average(updates, weights)

    def adapter(self, state: LoRA) -> LoRA:
        return state


class MistypesAKey(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return LoRA(A={"q_proj": updates[0].A["q_proj"]})


STRUCTURE = [
    (TransposesB(), "B is transposed: A is (r, d_in) and B is (d_out, r) everywhere"),
    (ExchangesTheFactors(), "A and B are exchanged"),
    (ForgetsTheHead(), "the head is left out"),
    (DividesByZero(), "look for a division by zero"),
    (AddsToTheState(), "in aggregate make new tensors"),
    (KeepsMomentum(), "it keeps something in self.momentum: what changes between rounds belongs in the state"),
    (DrawsUnseeded(), "it draws from torch's global generator: draw from torch.Generator()"),
    (IsNoDataclass(), "write @dataclass(frozen=True) above class IsNoDataclass"),
    (CountsOnItself(), "write @dataclass(frozen=True) above class CountsOnItself"),
    (MistypesAKey(), "KeyError: 'q_proj', raised in aggregate, line"),
]


@pytest.mark.parametrize(("strategy", "remedy"), STRUCTURE, ids=lambda x: type(x).__name__)
def test_a_mistake_of_structure_is_the_only_failure_and_says_what_to_do(strategy: Strategy[Any], remedy: str) -> None:
    results = run(strategy)
    assert [result.outcome for result in results].count("failed") == 1 and len(results) < len(CHECKS)
    assert remedy in most_likely(results) and remedy in results[-1].detail
    assert "object at 0x" not in results[-1].detail


class AddsUnweighted(FedAvg):
    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return map_factors(lambda *ts: sum(w * t for w, t in zip(weights, ts, strict=True)), *updates)


@dataclass(frozen=True)
class Median(FedAvg):
    """FedAvg's declarations, and another rule."""

    def aggregate(self, state: LoRA, updates: Updates, weights: Weights) -> LoRA:
        return map_factors(lambda *ts: torch.stack(ts).median(0).values, *updates)


class MedianOfItsOwnWeights(Median):
    own_weights = True


class SaysItWeighs(FedAvg):
    own_weights = True


class SaysExact(FedAvg):
    exact = True


class DeclaresNothing(FedAvg):
    sums_only = continues = False


class FedExSaysTooLittle(FedEx):
    exact = False


MATHEMATICS = [
    (AddsUnweighted(), "the weights are not divided by their sum"),
    (WeighsAllAlike(), "the weights change nothing: give them to average as they are, or declare own_weights = True"),
    (Median(), "the weights change nothing: give them to average as they are, or declare own_weights = True"),
    (MedianOfItsOwnWeights(), "take sums_only = True back in class MedianOfItsOwnWeights"),
    (SaysItWeighs(), "take own_weights = True back in class SaysItWeighs"),
    (SaysExact(), "take exact = True back in class SaysExact"),
    (DeclaresNothing(), "declare sums_only = True in class DeclaresNothing"),
    (FedExSaysTooLittle(), "declare exact = True in class FedExSaysTooLittle"),
]


@pytest.mark.parametrize(("strategy", "remedy"), MATHEMATICS, ids=lambda x: type(x).__name__)
def test_a_mistake_of_mathematics_is_named_before_what_comes_of_it(strategy: Strategy[Any], remedy: str) -> None:
    failed, likely = said_of(strategy)
    assert failed and likely.startswith(remedy)


def test_what_is_not_declared_is_told_with_the_declaration_and_without_numbers_of_nothing() -> None:
    failed, _ = said_of(DeclaresNothing())
    assert [result.check for result in failed] == ["check_sums_only_is_as_declared", "check_continues_is_as_declared"]
    assert failed[1].detail.endswith(
        "does not declare continues, and a client alone is sent what it ended with; "
        "declare continues = True in class DeclaresNothing"
    )


@pytest.mark.parametrize(
    ("strategy", "check", "remedy"),
    [
        (FedExSaysLittleIsSent(), check_numbers_sent_are_as_declared, repr(FedEx().down)),
        (FedExSaysDora(), check_it_works_with_the_kinds_it_declares, "take dora out of kinds"),
    ],
    ids=["numbers", "kinds"],
)
def test_a_declared_word_that_is_wrong_is_told_with_the_right_one(
    strategy: Strategy[Any], check: Any, remedy: str
) -> None:
    found = verify(check, strategy)
    assert found.outcome == "failed" and remedy in found.remedy


def test_the_last_line_but_one_says_what_is_most_likely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("from tests.support.bugs import TransposesB as T\nclass Mine(T): pass\n")
    assert not report([str(tmp_path / "mine.py")], {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("Mine: most likely: B is transposed: ")
    assert lines[-3].endswith("were not run, as they would fail for it") and lines[-1].startswith("1 checked: ")


@pytest.mark.parametrize("strategy", [load("ravan", heads=4), load("dual", local=3)], ids=str)
def test_a_strategy_that_takes_no_low_rank_is_checked_at_one_that_it_takes(strategy: Strategy[Any]) -> None:
    for check in (check_what_trains_moves_and_nothing_else, check_a_client_that_slept_computes_with_the_model):
        assert verify(check, strategy).outcome == "passed"
