"""Flower's own strategies as strategies here: each does over rounds what its own object does when kept alive."""

import copy
import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid, strategy
from torch.testing import assert_close

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, average
from fedlora.server.flower_strategy import OFFERED, REFUSED, FlowerStrategy, State, arrays, load, reply
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.strategies.fedavg import FedAvg
from fedlora.strategy import Client, title
from fedlora.vectors import to_vector
from tests.support.adapters import factors, fresh

OPTIONS: dict[str, dict[str, Any]] = {  # such that every rule does something
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedAdam": {"eta": 0.1},
    "FedYogi": {"eta": 0.1},
    "FedAdagrad": {"eta": 0.1},
    "Bulyan": {"num_malicious_nodes": 1},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
}
CLIENT = Client(id=0, examples=1, rank=4)
WEIGHTS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]  # seven: Bulyan needs 4 f + 3


def updates(round: int) -> list[LoRA]:
    return [factors(10 * round + i) for i in range(7)]


def run(flower: FlowerStrategy, rounds: int, start: LoRA | None = None) -> State:
    state = flower.init(start or fresh())
    for t in range(rounds):
        state = flower.aggregate(state, updates(t), WEIGHTS)
    return state


def leaves(tree: Any) -> list[torch.Tensor]:
    return list(checkpoint.pack(tree)[0].values())


def same(x: Any, y: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))


@pytest.fixture(params=OFFERED)
def flower(request: pytest.FixtureRequest) -> FlowerStrategy:
    return load(request.param, OPTIONS.get(request.param, {}))


def kept_alive(flower: FlowerStrategy, rounds: int) -> torch.Tensor:
    """The vector that one object of Flower's comes to, driven as Flower drives it but for the network."""
    own = OFFERED[flower.name](fraction_train=0.0, **cast(dict[str, Any], dict(flower.options)))
    record = arrays(to_vector(fresh(), torch.float64))
    for t in range(rounds):
        own.configure_train(t + 1, record, ConfigRecord(), cast(Grid, None))
        replies = [reply(to_vector(u, torch.float64), w) for u, w in zip(updates(t), WEIGHTS, strict=True)]
        result, _ = own.aggregate_train(t + 1, replies)
        assert result is not None
        record = result
    return torch.tensor(record["x"].numpy())


def test_three_rounds_are_those_of_flowers_own_object_kept_alive(flower: FlowerStrategy) -> None:
    got = to_vector(flower.adapter(run(flower, 3)), torch.float64)
    assert_close(got, kept_alive(flower, 3))


def test_flowers_fedavg_is_ours() -> None:
    got = run(load("FedAvg", {}), 1).lora
    assert_close(vars(got), vars(FedAvg().aggregate(fresh(), updates(0), WEIGHTS)))


def test_a_run_resumed_from_its_checkpoint_goes_on_as_it_would_have(flower: FlowerStrategy, tmp_path: Path) -> None:
    state = run(flower, 2)
    checkpoint.save(tmp_path, Checkpoint(2, state, {}))
    back = checkpoint.latest(tmp_path)
    assert back is not None
    assert same(*(flower.aggregate(s, updates(2), WEIGHTS) for s in (state, back.state)))


def test_arguments_are_left_alone(flower: FlowerStrategy) -> None:
    state, sent = run(flower, 1), updates(1)
    before = copy.deepcopy((state, sent))
    flower.aggregate(state, sent, WEIGHTS)
    assert same(before, (state, sent))


def test_order_of_clients_and_scale_of_weights_change_nothing(flower: FlowerStrategy) -> None:
    state, sent = run(flower, 1), updates(1)
    there = flower.aggregate(state, sent, WEIGHTS)
    back = flower.aggregate(state, sent[::-1], [0.1 * w for w in WEIGHTS[::-1]])
    assert_close(leaves(there), leaves(back))


def test_krum_breaks_a_tie_alike_in_any_order() -> None:
    krum, (a, b, c) = load("Krum", {}), updates(0)[:3]
    picked = [krum.aggregate(krum.init(fresh()), order, [1.0] * 3) for order in ([a, b, c], [c, b, a], [b, a, c])]
    assert same(picked[0], picked[1]) and same(picked[0], picked[2])


def test_sums_are_enough_where_it_says_so(flower: FlowerStrategy) -> None:
    """Seven clients that all sent the mean stand for one that did: Bulyan takes no fewer."""
    state, sent = run(flower, 1), updates(1)
    means = [average(sent, WEIGHTS)] * 7
    whole, summed = (leaves(flower.aggregate(state, u, WEIGHTS)) for u in (sent, means))
    assert all(torch.allclose(x, y) for x, y in zip(whole, summed, strict=True)) == flower.sums_only


def test_clients_of_one_mind_are_followed_where_it_says_so(flower: FlowerStrategy) -> None:
    after = leaves(flower.aggregate(run(flower, 1), [factors(1)] * 7, WEIGHTS).lora)
    assert all(torch.allclose(x, y) for x, y in zip(after, leaves(factors(1)), strict=True)) == flower.continues


def test_factors_of_half_precision_go_on_in_float32(flower: FlowerStrategy) -> None:
    start = factors(0, dtype=torch.bfloat16)
    assert {t.dtype for t in leaves(run(flower, 2, start).lora)} == {torch.float32}


def test_flower_says_nothing_of_it(flower: FlowerStrategy, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    caplog.set_level(logging.DEBUG)
    run(flower, 1)
    assert not caplog.records and capsys.readouterr() == ("", "")


def test_what_flower_says_elsewhere_is_heard_again(caplog: pytest.LogCaptureFixture) -> None:
    run(load("FedAvg", {}), 1)
    logger = logging.getLogger("flwr")  # which a simulation in this process may have cut off and silenced
    caplog.set_level(logging.DEBUG, "flwr")
    logger.addHandler(caplog.handler)
    logger.critical("a node left")
    logger.removeHandler(caplog.handler)
    assert "a node left" in caplog.text


def test_every_strategy_that_flower_exports_is_offered_or_refused_with_a_reason() -> None:
    assert {*OFFERED, *REFUSED} == set(strategy.__all__) - {"Strategy", "Result"}
    for name, reason in REFUSED.items():
        with pytest.raises(StrategyError, match=f"flwr:{name} .*{reason}"):
            load(name, {})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("FedAdm", {}, 'did you mean "FedAdam"'),
        ("Strategy", {}, "Flower has no strategy"),
        ("FedAdam", {"et": 0.1}, 'did you mean "eta"'),
        ("FedAdam", {"fraction_train": 0.5}, 'no option "fraction_train"'),
        ("FedAdam", {"eta_l": 0.5}, 'no option "eta_l"'),
        ("FedAdam", {"eta": "much"}, "option eta of strategy flwr:FedAdam = 'much'"),
        ("FedTrimmedAvg", {"beta": 0.7}, "beta"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_remedy(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(StrategyError, match=said):
        load(name, options)


def test_too_few_clients_for_bulyan_are_told_and_not_skipped() -> None:
    bulyan = load("Bulyan", {"num_malicious_nodes": 2})
    with pytest.raises(StrategyError, match="round 1: flwr:Bulyan made nothing of the updates of 7 clients"):
        run(bulyan, 1)


def test_a_word_from_the_command_line_becomes_a_number() -> None:
    assert load("FedAdam", {"eta": "0.1", "tau": 1}) == FlowerStrategy("FedAdam", (("eta", 0.1), ("tau", 1.0)))
    assert title(load("FedAdam", {})) == "Flower"
