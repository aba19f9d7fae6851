"""Every strategy that comes with fedlora keeps the contract; a new file in strategies/ is tested with no other edit."""

from typing import Any

import pytest

from fedlora.checks import on_random_factors, on_small_models
from fedlora.checks.contract import CHECKS, Check, label, words
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.capped import Capped
from fedlora.strategies.head import Head
from fedlora.strategies.robust import Robust
from fedlora.strategies.server_optimizer import ServerOptimizer
from fedlora.strategy import Strategy, catalogue, load

ENTRIES = [entry for entry in catalogue() if entry.cls.__module__.startswith("fedlora.strategies.")]
OPTIONS = [  # what changes a declaration, or what is sent
    load("dp_lora", trains="B"),
    load("fedask", rest=False),
    load("fedex_lora", rank=2),
    load("fedex_lora", assignment="reinit"),
    load("fedex_lora", assignment="keep"),
    load("fedmomentum", energy=0.5),
    load("fedrot_lora", soft=0.5),
    load("fedsvd", every=0),
    load("fedsvd", every=2),
    load("ffa_lora", orthonormal=True),
    load("florist", energy=1.0),
    load("hetlora", weighting="examples"),
    load("la_lora", every=0),
    load("lora_fair", form="cosine"),
    load("q_ffl", lipschitz=2.0),
    load("ravan", heads=1, scales=False),
]
WRAPPED = [
    Anchored(load("fedex_lora", assignment="keep")),
    Anchored(load("flora")),
    Capped(load("fedex_lora"), 3),
    Capped(load("flora"), 64),
    Capped(load("fedmomentum"), 3),
    Head(load("fedavg"), "local"),
    Head(load("fedex_lora"), "frozen"),
    Head(load("la_lora"), "frozen"),
    Head(load("scaffold"), "local"),
    Robust(load("fedavg"), "median"),
    Robust(load("fedex_lora"), "norm_bound", bound=1.0),
    ServerOptimizer(load("fedavg"), "adam"),
    ServerOptimizer(load("fedex_lora"), "momentum"),
    ServerOptimizer(load("rolora"), "yogi"),
    ServerOptimizer(Head(load("fedsa_lora"), "local"), "adagrad"),
]
LET_OFF = {  # of what all others keep, by their own rule
    ("florist", on_random_factors.check_one_client_alone_is_followed),  # it cuts even a single client's product
    ("hetlora", on_random_factors.check_twice_the_weight_counts_as_two_clients),  # it weighs by norms
}
OF_KEPT_ROWS = on_random_factors.check_rows_that_stay_with_clients_are_theirs_alone  # with dual adapters alone
QUICK = [check for check in CHECKS if check.__module__ != on_small_models.__name__]
QUICK += [
    on_small_models.check_numbers_sent_are_as_declared,
    on_small_models.check_a_model_is_its_weights_plus_s_times_the_product,
]


@pytest.mark.parametrize("check", CHECKS, ids=label)
@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
def test_a_built_in_keeps_the_contract(name: str, check: Check) -> None:
    skip = check(load(name))
    let_off = (name, check) in LET_OFF or (check is OF_KEPT_ROWS and name != "dual")
    assert bool(skip) == let_off or check.__module__ != on_random_factors.__name__
    if skip:
        pytest.skip(skip.reason)


@pytest.mark.parametrize("check", QUICK, ids=label)
@pytest.mark.parametrize("strategy", OPTIONS + WRAPPED, ids=str)
def test_an_option_or_a_wrapper_keeps_the_contract(strategy: Strategy[Any], check: Check) -> None:
    if skip := check(strategy):
        pytest.skip(skip.reason)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_paper_is_named(entry: Any) -> None:
    assert entry.paper.startswith("https://") and entry.title


@pytest.mark.parametrize("check", CHECKS, ids=label)
def test_a_check_says_in_a_sentence_what_it_verifies(check: Check) -> None:
    assert words(check).endswith(".") and len(words(check)) > 30
