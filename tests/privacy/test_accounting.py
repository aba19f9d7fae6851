"""Epsilon, against an accountant that is not ours, and the noise that keeps it."""

from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import dp_event, pld

from fedlora.jobs import Charge
from fedlora.privacy.accounting import calibrate, epsilon, merge_charges, prv, rdp

ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
CASES = [(1.0, 0.032, 1000, 1e-5), (2.0, 0.1, 200, 1e-4), (0.8, 128 / 60000, 500, 1e-6), (3.0, 0.25, 60, 1e-5)]


def independent(charges: list[Charge], delta: float) -> float:
    """By Google's privacy loss distributions."""
    accountant = pld.PLDAccountant(ADD_OR_REMOVE, value_discretization_interval=1e-3)
    for c in charges:
        accountant.compose(dp_event.PoissonSampledDpEvent(c.rate, dp_event.GaussianDpEvent(c.noise)), c.steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), CASES)
def test_epsilon_is_what_another_accountant_says(noise: float, rate: float, steps: int, delta: float) -> None:
    charge = [Charge(noise=noise, rate=rate, steps=steps)]
    assert epsilon(charge, delta=delta) == pytest.approx(independent(charge, delta), abs=0.03)
    assert epsilon(charge, delta=delta) == prv(charge, delta=delta) <= rdp(charge, delta=delta)


def test_unlike_charges_add_up() -> None:
    first = Charge(noise=1.5, rate=0.05, steps=40)
    charges = [first, Charge(noise=2.5, rate=0.1, steps=60), replace(first, steps=10)]
    assert epsilon(charges, delta=1e-5) == pytest.approx(independent(charges, 1e-5), abs=0.03)


def test_a_ledger_of_many_rounds_costs_what_one_long_one_does() -> None:
    """An accountant made anew each round would say the epsilon of the last one alone."""
    rounds = [Charge(noise=1.0, rate=0.032, steps=10)] * 100
    assert merge_charges(rounds) == (Charge(noise=1.0, rate=0.032, steps=1000),)
    whole = epsilon([Charge(noise=1.0, rate=0.032, steps=1000)], delta=1e-5)
    assert epsilon(rounds, delta=1e-5) == whole > 3 * epsilon(rounds[:1], delta=1e-5)


@pytest.mark.parametrize("charges", [[], [Charge(noise=1.0, rate=0.1, steps=0)]])
def test_nothing_spent_is_nothing(charges: list[Charge]) -> None:
    assert epsilon(charges, delta=1e-5) == 0.0


def test_without_noise_epsilon_is_infinite() -> None:
    assert epsilon([Charge(noise=0.0, rate=0.1, steps=1)], delta=1e-5) == float("inf")


def test_where_the_tight_accountant_would_take_minutes_the_loose_one_answers() -> None:
    charges = [Charge(noise=0.1, rate=0.01, steps=5)]
    assert prv(charges, delta=1e-5) == float("inf")
    assert epsilon(charges, delta=1e-5) == rdp(charges, delta=1e-5) < float("inf")


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.02, 40), (0.25, 30)])
def test_calibrated_noise_spends_the_budget_and_no_more(target: float, rate: float, steps: int) -> None:
    noise = calibrate(target=target, delta=1e-5, rate=rate, steps=steps)
    spent = epsilon([Charge(noise=noise, rate=rate, steps=steps)], delta=1e-5)
    assert 0.99 * target <= spent <= target


def test_noise_is_for_all_steps_and_not_for_a_rounds() -> None:
    """Noise chosen for each of 20 rounds by itself, as some releases do, would spend several times as much."""
    whole = calibrate(target=3.0, delta=1e-5, rate=0.032, steps=200)
    each = calibrate(target=3.0, delta=1e-5, rate=0.032, steps=10)
    assert epsilon([Charge(noise=whole, rate=0.032, steps=10)] * 20, delta=1e-5) <= 3.0
    assert epsilon([Charge(noise=each, rate=0.032, steps=10)] * 20, delta=1e-5) > 6.0
