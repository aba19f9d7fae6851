"""What is put round a strategy, and what is refused with its reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedlora.config import build
from fedlora.errors import StrategyError
from fedlora.lora import LoRA, delta
from fedlora.run.compose import check_kind_and_ranks, compose
from fedlora.strategy import Client, load
from tests.support.adapters import factors, fresh


def composed(start: LoRA | None = None, ranks: tuple[int, ...] = (), **keys: Any) -> Any:
    return compose(build({k.replace("__", "."): v for k, v in keys.items()}), start or fresh(), ranks)


def layers(strategy: Any) -> list[str]:
    return [type(strategy).__name__, *(layers(strategy.inner) if hasattr(strategy, "inner") else [])]


def test_a_plain_run_has_the_strategy_alone() -> None:
    assert composed(strategy="fedex_lora") == load("fedex_lora")


def test_wrappers_go_round_from_the_base_to_what_sees_single_updates() -> None:
    keys = {
        "model.head": "local",
        "aggregate.optimizer": "adam",
        "aggregate.robust": "median",
        "aggregate.offset_rank": 4,
    }
    made = compose(build(keys), factors(1))
    assert layers(made) == ["Robust", "ServerOptimizer", "Head", "Capped", "Anchored", "FedAvg"]


def test_a_quantised_base_caps_the_offset() -> None:
    made = composed(strategy="fedex_lora", model__quantize="4bit")
    assert layers(made) == ["Capped", "FedEx"] and made.rank == 256


def test_a_start_that_is_not_zero_is_taken_off_the_base() -> None:
    made = composed(start=factors(1), strategy="fedex_lora")
    state = made.init(factors(1))
    zero = {m: torch.zeros_like(d) for m, d in delta(fresh()).items()}
    assert_close(dict(delta(made.adapter(state))), zero)
    assert made.client_init(state, Client(0, 1, 4)).offset


def test_clients_of_low_rank_cannot_start_from_a_piece_of_a_product() -> None:
    with pytest.raises(StrategyError, match=r"lora.init = pissa .* lose a piece"):
        composed(start=factors(1), ranks=(2, 4), strategy="flora", lora__init="pissa")


@pytest.mark.parametrize("name", ["fedex_lora", "flora", "florist", "flexlora"])
@pytest.mark.parametrize("kind", ["dora", "vera"])
def test_products_have_no_meaning_for_dora_and_vera(name: str, kind: str) -> None:
    with pytest.raises(StrategyError, match=rf"cannot train lora.kind = {kind}: .* it works with .*fedavg"):
        check_kind_and_ranks(load(name), kind)


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fedsa_lora", "rolora"])
@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_means_of_sides_take_every_kind(name: str, kind: str) -> None:
    check_kind_and_ranks(load(name), kind)


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fedsa_lora", "fedex_lora", "rolora", "lora_fair"])
def test_mixed_ranks_are_refused_with_those_that_take_them(name: str) -> None:
    those = r"fedex_lora with assignment = reinit or keep, .*flexlora, flora, .*hetlora"
    with pytest.raises(StrategyError, match=rf"clients of one rank, and lora.ranks gives 2 to 8; .*{those}"):
        check_kind_and_ranks(load(name), "lora", (8, 2, 4))


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "fslora", "florist", "fedmomentum", "raflora"])
def test_these_take_mixed_ranks(name: str) -> None:
    check_kind_and_ranks(load(name), "lora", (8, 2, 4))


def test_an_optimizer_over_rounds_is_refused_where_every_round_starts_anew() -> None:
    with pytest.raises(StrategyError):
        composed(strategy="flora", aggregate__optimizer="adam")


def test_a_median_is_refused_where_products_of_single_clients_are_needed() -> None:
    with pytest.raises(StrategyError):
        composed(strategy="fedex_lora", aggregate__robust="median")


def test_a_run_goes_on_with_the_same_strategy() -> None:
    config = build({"strategy": "fedex_lora", "option.rank": 2})
    assert compose(config, fresh()) == compose(replace(config, rounds=99), fresh())
