"""Epsilon, against an accountant that is not ours, and the noise that keeps it."""

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
    charge = [Charge(noise, rate, steps)]
    assert epsilon(charge, delta) == pytest.approx(independent(charge, delta), abs=0.03)
    assert epsilon(charge, delta) == prv(charge, delta) <= rdp(charge, delta)


def test_unlike_charges_add_up() -> None:
    charges = [Charge(1.5, 0.05, 40), Charge(2.5, 0.1, 60), Charge(1.5, 0.05, 10)]
    assert epsilon(charges, 1e-5) == pytest.approx(independent(charges, 1e-5), abs=0.03)


def test_a_ledger_of_many_rounds_costs_what_one_long_one_does() -> None:
    """An accountant made anew each round would say the epsilon of the last one alone."""
    rounds = [Charge(1.0, 0.032, 10)] * 100
    assert merge_charges(rounds) == (Charge(1.0, 0.032, 1000),)
    assert epsilon(rounds, 1e-5) == epsilon([Charge(1.0, 0.032, 1000)], 1e-5) > 3 * epsilon(rounds[:1], 1e-5)


@pytest.mark.parametrize("charges", [[], [Charge(1.0, 0.1, 0)]])
def test_nothing_spent_is_nothing(charges: list[Charge]) -> None:
    assert epsilon(charges, 1e-5) == 0.0


def test_without_noise_epsilon_is_infinite() -> None:
    assert epsilon([Charge(0.0, 0.1, 1)], 1e-5) == float("inf")


def test_where_the_tight_accountant_would_take_minutes_the_loose_one_answers() -> None:
    assert prv([Charge(0.1, 0.01, 5)], 1e-5) == float("inf")
    assert epsilon([Charge(0.1, 0.01, 5)], 1e-5) == rdp([Charge(0.1, 0.01, 5)], 1e-5) < float("inf")


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(("rate", "steps"), [(0.02, 40), (0.25, 30)])
def test_calibrated_noise_spends_the_budget_and_no_more(target: float, rate: float, steps: int) -> None:
    spent = epsilon([Charge(calibrate(target, 1e-5, rate, steps), rate, steps)], 1e-5)
    assert 0.99 * target <= spent <= target


def test_noise_is_for_all_steps_and_not_for_a_rounds() -> None:
    """Noise chosen for each of 20 rounds by itself, as some releases do, would spend several times as much."""
    whole, each = calibrate(3.0, 1e-5, 0.032, 200), calibrate(3.0, 1e-5, 0.032, 10)
    assert epsilon([Charge(whole, 0.032, 10)] * 20, 1e-5) <= 3.0
    assert epsilon([Charge(each, 0.032, 10)] * 20, 1e-5) > 6.0
