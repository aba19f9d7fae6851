"""Epsilon, against an accountant that is not ours, and the noise that keeps it."""

import time
from dataclasses import replace
from math import inf, nan
from resource import RUSAGE_SELF, getrusage

import dp_accounting
import pytest
from dp_accounting import dp_event, pld
from opacus.accountants import PRVAccountant, RDPAccountant

from fedlora.errors import PrivacyError
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


def test_nothing_spent_is_nothing() -> None:
    assert epsilon([], delta=1e-5) == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", n) for n in (0, -5, 10**10, True, 1.5)),
        *(("rate", q) for q in (0.0, -0.1, 1.1, nan)),
        *(("noise", z) for z in (-1.0, nan, inf, 1e7)),
    ],
)
def test_a_charge_that_no_mechanism_has_pays_nothing_back(name: str, value: float) -> None:
    """One of -5 steps, merged with others, would take something off what was spent."""
    charge = Charge(noise=1.0, rate=0.1, steps=5)
    with pytest.raises(PrivacyError, match=name):
        epsilon([charge, replace(charge, **{name: value})], delta=1e-5)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    "charges",
    [
        [Charge(noise=0.31, rate=1.0, steps=1000)],
        [Charge(noise=1.0, rate=0.5, steps=10**9)],
        [Charge(noise=1e6, rate=0.5, steps=10)],
        [Charge(noise=1 + n / 1000, rate=0.02, steps=100) for n in range(300)],
    ],
)
def test_no_charge_that_is_in_bounds_takes_minutes_or_gigabytes(charges: list[Charge]) -> None:
    """A server could ask for them, and a client's worker does one thing at a time."""
    began, before = time.monotonic(), getrusage(RUSAGE_SELF).ru_maxrss
    assert 0 <= epsilon(charges, delta=1e-5) < inf
    assert time.monotonic() - began < 60 and getrusage(RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("delta", [1e-12, 1e-13])
def test_epsilon_at_a_delta_lost_in_rounding_is_not_below_what_another_accountant_says(delta: float) -> None:
    charge = [Charge(noise=2.0, rate=0.1, steps=100)]
    assert prv(charge, delta=delta) == inf
    assert epsilon(charge, delta=delta) == rdp(charge, delta=delta) >= independent(charge, delta)


def test_epsilon_by_renyi_is_that_of_opacus() -> None:
    accountant = RDPAccountant()
    accountant.history = [(1.5, 0.05, 40), (2.5, 0.1, 60)]
    charges = [Charge(noise=z, rate=q, steps=n) for z, q, n in accountant.history]
    assert rdp(charges, delta=1e-5) == pytest.approx(accountant.get_epsilon(delta=1e-5), rel=1e-12)


def test_epsilon_by_privacy_losses_is_that_of_opacus_to_the_last_bit() -> None:
    accountant = PRVAccountant()
    accountant.history = [(1.0, 0.032, 100), (2.5, 0.1, 60)]
    charges = [Charge(noise=z, rate=q, steps=n) for z, q, n in accountant.history]
    assert prv(charges, delta=1e-5) == accountant.get_epsilon(delta=1e-5, eps_error=0.01)
