"""What cannot run asynchronously is refused before anything is loaded, with the reason."""

from typing import Any

import pytest

from fedlora import config as configuration
from fedlora.api import new_run
from fedlora.errors import ConfigError, FedloraError, StrategyError
from fedlora.run.asynchronous import buffer_of, check_asynchronous, check_buffer, refuse_simulated
from fedlora.strategy import load

ASYNC = {"server.mode": "async"}
REFUSED = {  # a setting or a strategy -> what the refusal says
    "secure.aggregation=true": "a masked sum needs to know beforehand whose updates are in it",
    "dp.noise=1 dp.level=client": "counts on clients that are drawn anew in every round",
    "exactness=true": "no mean of the clients' models",
    "aggregate.robust=median": "compares the clients of one round",
    "strategy=fedex_lora": "its mean is no sum of what the clients send",
    "strategy=flora": "its mean is no sum",
    "strategy=lora_fair": "its mean is no sum",
    "strategy=hetlora": "its mean is no sum",
    "strategy=fedsvd": "another basis in every round",
    "strategy=flexlora": "its mean is no sum",
    "strategy=fedask": "asks the same clients twice in a round",
    "strategy=scaffold": "its mean is no sum",
    "strategy=rolora": "has AH and BH sent back in turn",
}


def settings(text: str) -> configuration.Config:
    return configuration.build(ASYNC, dict(word.split("=") for word in text.split()))


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_asynchronous_is_refused_with_the_reason(text: str) -> None:
    config = settings(text)
    with pytest.raises(FedloraError, match=REFUSED[text]):
        check_asynchronous(load(config.strategy), config)
    check_asynchronous(load(config.strategy), configuration.build(dict(word.split("=") for word in text.split())))


@pytest.mark.parametrize(
    "name", ["fedavg", "ffa_lora", "fedsa_lora", "fed_sb", "fslora", "dp_lora", "ravan", "la_lora", "dual"]
)
def test_strategies_whose_mean_is_a_sum_in_one_basis_may(name: str) -> None:
    check_asynchronous(load(name), settings(f"strategy={name} dp.noise=1"))


@pytest.mark.parametrize(("name", "options"), [("hetlora", {"weighting": "examples"}), ("fedsvd", {"every": 0})])
def test_what_is_refused_follows_from_the_options(name: str, options: dict[str, Any]) -> None:
    check_asynchronous(load(name, **options), settings(f"strategy={name}"))


def test_a_side_in_turn_by_the_round_is_refused_and_by_the_step_is_not() -> None:
    check_asynchronous(load("la_lora", every=1), settings("strategy=la_lora"))
    with pytest.raises(StrategyError, match="sent back in turn"):
        check_asynchronous(load("la_lora", every=0), settings("strategy=la_lora"))


def test_it_is_refused_before_a_model_is_loaded(tmp_path: Any) -> None:
    with pytest.raises(StrategyError, match=r"server.mode = async and FedSVD"):
        new_run({}, {**ASYNC, "strategy": "fedsvd", "model.path": "nowhere"}, tmp_path)


def test_a_buffer_is_half_of_the_cohort_and_never_more_than_the_clients() -> None:
    config = configuration.build(ASYNC, {"clients": 9, "cohort": 8})
    assert buffer_of(config) == 4
    check_buffer(config)
    with pytest.raises(ConfigError, match=r"server.buffer = 10 is more than the 9 clients there are"):
        check_buffer(configuration.build(ASYNC, {"clients": 9, "server.buffer": 10}))


def test_a_deployment_has_no_simulated_clients_and_waits_for_no_scores() -> None:
    with pytest.raises(ConfigError, match="those of a deployment are real"):
        refuse_simulated(configuration.build({"simulation.speed": "1,2"}))
    with pytest.raises(ConfigError, match=r"data.holdout = 0.2: the server would wait for the scores"):
        refuse_simulated(configuration.build(ASYNC, {"data.holdout": 0.2}))
