"""The DP parameters of a run's clients, and what is refused because it cannot be kept."""

from dataclasses import replace

import pytest

from fedlora import config as configuration
from fedlora.config import Config
from fedlora.errors import ConfigError, PrivacyError
from fedlora.jobs import Charge
from fedlora.privacy.accounting import epsilon
from fedlora.privacy.client_level import client_level_dp
from fedlora.privacy.record_level import record_level_dp
from fedlora.run.compose import compose
from fedlora.run.privacy_report import group
from fedlora.sections import PrivacyConfig, Training
from fedlora.strategy import Client
from tests.support.adapters import fresh

CLIENTS = [Client(0, 400, 4, records=400), Client(1, 100, 4, records=100)]
TRAINING = Training(batch_size=10, steps=4)
THREE = PrivacyConfig(epsilon=3.0)


def test_privacy_is_off_until_it_is_asked_for() -> None:
    assert not PrivacyConfig().on and not Config().dp.on
    assert THREE.by_record and PrivacyConfig(noise=1.0).by_record and replace(THREE, level="client").by_client


def test_every_client_has_the_noise_that_its_own_rate_needs() -> None:
    made = record_level_dp(THREE, TRAINING, 10, CLIENTS)
    large, small = (made.terms_for(c) for c in CLIENTS)
    assert (large.rate, small.rate) == (0.025, 0.1) and large.noise < small.noise
    assert all(2.95 < made.final_epsilon(c) <= 3.0 for c in CLIENTS)


def test_noise_is_for_the_most_rounds_that_a_client_may_join() -> None:
    """Not for an average: of 10 rounds, each client may be drawn in all."""
    every = record_level_dp(THREE, TRAINING, 10, CLIENTS)
    some = record_level_dp(replace(THREE, joins=3), TRAINING, 10, CLIENTS)
    assert (every.max_participations, some.max_participations) == (10, 3)
    assert some.terms_for(CLIENTS[0]).noise < every.terms_for(CLIENTS[0]).noise
    assert some.final_epsilon(CLIENTS[0]) <= 3.0


def test_a_rate_can_be_common_and_noise_be_given() -> None:
    made = record_level_dp(PrivacyConfig(noise=2.0, rate=0.05), replace(TRAINING, steps=0, epochs=2.0), 10, CLIENTS)
    for c in CLIENTS:
        p = made.terms_for(c, known=3)
        assert (p.rate, p.noise, p.steps, p.known) == (0.05, 2.0, 40, 3)  # two epochs at a twentieth a step


def test_delta_is_small_against_every_client() -> None:
    """The largest has the most records of which one might be given away."""
    made = record_level_dp(THREE, TRAINING, 10, CLIENTS)
    assert [made.delta_for(c) for c in CLIENTS] == [1e-5, 1e-5]
    many = [*CLIENTS, Client(2, 10**6, 4, records=10**6)]
    assert record_level_dp(THREE, TRAINING, 10, many).delta_for(many[2]) == pytest.approx(1e-7)


@pytest.mark.parametrize("records", [0, 1, 9, 10**9, 10**12])
@pytest.mark.parametrize("given", [{}, {"delta": 1e-6}, {"rate": 0.05}])
def test_a_client_whose_records_cannot_be_is_left_out_and_changes_nobody_elses_terms(
    records: int, given: dict[str, float]
) -> None:
    odd = Client(7, 1, 4, records=records)
    alone, among = (record_level_dp(replace(THREE, **given), TRAINING, 10, c) for c in (CLIENTS, [*CLIENTS, odd]))
    assert [alone.terms_for(c) for c in CLIENTS] == [among.terms_for(c) for c in CLIENTS]
    if records < 10 or "delta" in given:
        assert "client 7" in among.why_left_out(odd)
    assert not any(map(among.why_left_out, CLIENTS))


def test_a_client_of_more_records_than_a_round_can_go_through_is_left_out() -> None:
    made = record_level_dp(THREE, replace(TRAINING, steps=0), 10, CLIENTS)
    assert "10000000000 steps a round" in made.why_left_out(Client(7, 1, 4, records=10**11))


@pytest.mark.parametrize(
    ("dp", "training", "clients", "says"),
    [
        (
            replace(THREE, delta=0.01),
            TRAINING,
            CLIENTS[:1],
            r"dp.delta = 0.01 is not below 1/N = 0.0025 of client 0, which has",
        ),
        (
            THREE,
            replace(TRAINING, batch_size=101),
            CLIENTS[1:],
            r"= 101 is more than the records of client 1, which has 100",
        ),
        (THREE, replace(TRAINING, accumulate=11), CLIENTS[1:], r"train.batch_size \* train.accumulate = 110 is more"),
        (
            replace(THREE, rate=0.005),
            TRAINING,
            CLIENTS[1:],
            r"dp.rate = 0.005 is less than one record a step for client 1",
        ),
        (THREE, TRAINING, [Client(4, 0, 4, records=0)], r"client 4 has no records to train on"),
    ],
)
def test_what_is_no_privacy_is_refused(dp: PrivacyConfig, training: Training, clients: list[Client], says: str) -> None:
    with pytest.raises(PrivacyError, match=says):
        record_level_dp(dp, training, 10, clients)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dp.epsilon": 0}, "dp.epsilon = 0"),
        ({"dp.epsilon": -1}, "dp.epsilon = -1"),
        ({"dp.delta": 1.0}, "dp.delta = 1.0"),
        ({"dp.clip": 0}, "dp.clip = 0"),
        ({"dp.level": "patient"}, "dp.level = 'patient': input should be 'record' or 'client'"),
        ({"dp.unit": "person"}, "dp.unit = 'person': input should be 'row' or 'example'"),
        ({"dp.epsilom": 3}, 'did you mean "dp.epsilon"'),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configuration.build(given)


def test_clients_are_hidden_by_noise_for_all_rounds() -> None:
    made = client_level_dp(replace(THREE, level="client"), cohort=20, clients=1000, rounds=10, seed=0)
    assert made.rate == 0.02 and made.delta == 1e-5 and made.seed is None
    with pytest.raises(PrivacyError, match=r"dp.delta = 0.01 is not below 1/N = 0.01 of 100 clients"):
        client_level_dp(replace(THREE, level="client", delta=0.01), cohort=20, clients=100, rounds=10, seed=0)


def test_under_secure_aggregation_noise_is_for_a_client_that_is_in_every_round() -> None:
    """Its members are told who else is in a round, so that sampling hides nobody from them."""
    of = {"cohort": 20, "clients": 1000, "rounds": 10, "seed": 0}
    hidden = client_level_dp(replace(THREE, level="client"), **of)
    known = client_level_dp(replace(THREE, level="client"), **of, secure=True)
    assert known.charge_of(rounds=10) == Charge(noise=known.noise, rate=1.0, steps=10)
    assert epsilon([known.charge_of(rounds=10)], delta=known.delta) <= 3 and known.noise > 3 * hidden.noise
    assert known.rate == hidden.rate == 0.02
    earlier = [Charge(noise=known.noise, rate=0.02, steps=4)]  # of a run that an older version began
    assert known.charge(earlier) == (Charge(noise=known.noise, rate=1.0, steps=5),)


@pytest.mark.parametrize("strategy", ["fedex_lora", "flora", "lora_fair", "flexlora", "hetlora", "florist"])
@pytest.mark.parametrize("way", [{"dp.epsilon": 3, "dp.level": "client"}, {"secure.aggregation": True}])
def test_a_strategy_that_needs_single_updates_is_refused_where_there_are_sums_alone(
    strategy: str, way: dict[str, object]
) -> None:
    with pytest.raises(PrivacyError, match=r"needs every client's own update or product.*fedavg"):
        compose(configuration.build({"strategy": strategy, **way}), fresh())


def test_every_strategy_can_hide_records() -> None:
    for name in ("fedex_lora", "flora", "lora_fair", "fedsa_lora"):
        compose(configuration.build({"strategy": name, "dp.epsilon": 3}), fresh())


def test_a_robust_rule_is_refused_where_there_are_sums_alone() -> None:
    with pytest.raises(PrivacyError, match=r"aggregate.robust = median compares the clients' updates"):
        compose(configuration.build({"aggregate.robust": "median", "secure.aggregation": True}), fresh())


def test_several_records_of_one_person_add_up() -> None:
    assert group(1, epsilon=3.0, delta=1e-5) == pytest.approx((3.0, 1e-5))
    assert group(2, epsilon=1.0, delta=1e-5) == pytest.approx((2.0, 1e-5 * (1 + 2.718281828)))
    assert group(50, epsilon=20.0, delta=1e-5) == (1000.0, 1.0)
