"""How much privacy a client has spent, and how much noise keeps it within a budget.

A charge is so many steps of the Poisson-subsampled Gaussian mechanism. Charges are added up as privacy loss random
variables (Gopi, Lee and Wutschitz, Numerical Composition of Differential Privacy, NeurIPS 2021,
https://arxiv.org/abs/2106.02848) by Opacus's accountant, and once more by Renyi DP (Mironov, Talwar and Zhang, 2019,
https://arxiv.org/abs/1908.10530), which is looser and fails in other places.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from math import exp, inf, isfinite, log
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge

SLACK = 0.02  # what PRV may be above RDP: twice the error that it is asked for
TOLERANCE = 0.004  # relative, of calibrated noise: epsilon ends this little below what was asked for
LEAST = 0.3  # sigma below which PRV takes minutes, and epsilon is beyond all meaning


def merge_charges(charges: Sequence[Charge]) -> tuple[Charge, ...]:
    """The same charges, those of one mechanism as one: the time PRV takes grows with how many there are."""
    steps: dict[tuple[float, float], int] = {}
    for c in charges:
        steps[c.noise, c.rate] = steps.get((c.noise, c.rate), 0) + c.steps
    return tuple(Charge(noise, rate, n) for (noise, rate), n in sorted(steps.items()) if n)


def epsilon(charges: Sequence[Charge], delta: float) -> float:
    """What these charges come to at this delta: PRV's upper bound, or RDP's where PRV cannot be right."""
    return _epsilon(merge_charges(charges), delta)


def prv(charges: Sequence[Charge], delta: float) -> float:
    """By privacy loss random variables; inf where that fails, or would take minutes."""
    from opacus.accountants import PRVAccountant  # here, as it takes a second

    if any(c.noise < LEAST for c in charges):
        return inf
    try:
        return _asked(PRVAccountant(), merge_charges(charges), delta)
    except (ValueError, RuntimeError, OverflowError, MemoryError):
        return inf


def rdp(charges: Sequence[Charge], delta: float) -> float:
    """By Renyi differential privacy."""
    from opacus.accountants import RDPAccountant

    return _asked(RDPAccountant(), merge_charges(charges), delta)


@cache
def _epsilon(charges: tuple[Charge, ...], delta: float) -> float:
    if not charges:
        return 0.0
    if any(c.noise <= 0 for c in charges):
        return inf
    tight, loose = prv(charges, delta), rdp(charges, delta)
    return max(0.0, tight if isfinite(tight) and tight <= loose + SLACK else loose)


def calibrate(target: float, delta: float, rate: float, steps: int) -> float:
    """The least noise with which so many steps come to this epsilon, to a part in two hundred, and no more.

    Raises `PrivacyError` where no noise does.
    """
    return _calibrated(target, delta, rate, steps)


@cache
def _calibrated(target: float, delta: float, rate: float, steps: int) -> float:
    def off(noise: float) -> float:
        return log(max(epsilon([Charge(noise, rate, steps)], delta), 1e-9) / target)

    high = _guess(target, delta, rate, steps)
    while (above := off(high)) > 0:  # epsilon falls as noise grows
        high *= 1.25
        if high > 1e6:
            raise PrivacyError(
                f"dp.epsilon = {target:g} at delta = {delta:g} cannot be kept over {steps} steps at rate {rate:g}; "
                "ask for a larger epsilon, or for fewer steps"
            )
    low = high / 1.1
    while (below := off(low)) <= 0 and low > 1e-2:
        high, above, low = low, below, low / 1.1
    while above < -TOLERANCE:  # the secant of two curves that are nearly straight lines in these axes
        middle = exp(log(low) + (log(high) - log(low)) * min(0.95, max(0.05, below / (below - above) + 0.05)))
        if (here := off(middle)) > 0:
            low, below = middle, here
        else:
            high, above = middle, here
    return high


def _guess(target: float, delta: float, rate: float, steps: int) -> float:
    """Noise of about the right size, by the central limit theorem of Gaussian DP: a place to begin at."""
    from opacus.accountants.analysis.gdp import compute_eps_poisson

    noise = 0.4
    while noise < 1e6:
        try:
            if compute_eps_poisson(steps=steps, noise_multiplier=noise, sample_rate=rate, delta=delta) <= target:
                break
        except (ValueError, OverflowError):
            pass  # too little noise for its formula
        noise *= 1.1
    return noise


def _asked(accountant: Any, charges: Sequence[Charge], delta: float) -> float:
    accountant.history = [(c.noise, c.rate, c.steps) for c in charges]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order lies at an end of the list: a looser bound, and a bound
        return float(accountant.get_epsilon(delta=delta))


def default_delta(delta: float, n: int, who: str) -> float:
    """The delta of n units. Raises `PrivacyError` for one that would let a whole unit be given away."""
    if delta >= 1 / n:
        raise PrivacyError(
            f"dp.delta = {delta:g} is not below 1/N = {1 / n:.2g} of {who}: it would allow one of them to be given "
            f"away whole; set {1 / (10 * n):.0e} or less"
        )
    return delta or min(1e-5, 1 / (10 * n))
