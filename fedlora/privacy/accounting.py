"""How much privacy a client has spent, and how much noise keeps it within a budget.

A charge is a number of steps of the Poisson-subsampled Gaussian mechanism. Charges are composed as privacy loss random
variables (PRV; Gopi, Lee and Wutschitz, Numerical Composition of Differential Privacy, NeurIPS 2021,
https://arxiv.org/abs/2106.02848) by Opacus's accountant, and a second time by Renyi DP (RDP; Mironov, Talwar and Zhang,
2019, https://arxiv.org/abs/1908.10530), which gives a looser bound and fails in other places.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import exp, inf, isfinite, log, sqrt
from typing import Any

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge

EPSILON_ERROR = 0.01  # that PRV is asked for, and a thousandth of delta beside it
SLACK = 0.02  # by how much PRV's epsilon may exceed RDP's: twice the numerical error that PRV is asked for
TOLERANCE = 0.004  # relative: the epsilon of calibrated noise ends this little below its target
LEAST = 0.3  # sigma below which PRV takes minutes, and epsilon is beyond all meaning
MOST = 1e6  # sigma above which no noise is looked for
WIDE = 1e3  # sigma above which PRV, and RDP at orders between whole numbers, may take minutes
MOST_STEPS = 10**9
LEAST_DELTA = 1e-11  # below which PRV's sums are lost in rounding: at 1e-12 its epsilon is too small
MOST_POINTS = 2**22  # of PRV's grid: half a gigabyte, and a second for each mechanism
MOST_WORK = 2**25  # points of all mechanisms together
WHOLE_ORDERS = tuple(float(n) for n in range(2, 64))
ORDERS = (*(1 + n / 10 for n in range(1, 100)), *(float(n) for n in range(12, 64)))  # Opacus's


def refuse_charge(charge: Charge) -> None:
    """Raise `PrivacyError` for a charge that no mechanism has: one of -5 steps would pay back what others spent."""
    for name, value, fits, takes in (
        ("noise", charge.noise, 0 < charge.noise <= MOST, f"a number above 0, {MOST:g} at most"),
        ("rate", charge.rate, 0 < charge.rate <= 1, "a probability above 0"),
        ("steps", charge.steps, _is_count(charge.steps), f"a whole number from 1 to {MOST_STEPS:,}"),
    ):
        if not fits:
            raise PrivacyError(f"{name} = {value!r}, and it is {takes}")


def _is_count(steps: int) -> bool:
    return isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= MOST_STEPS


def merge_charges(charges: Sequence[Charge]) -> tuple[Charge, ...]:
    """Return the same charges with one entry per mechanism: PRV's running time grows with the number of entries.

    Raises `PrivacyError` for a charge that would take something off the others.
    """
    steps: dict[tuple[float, float], int] = {}
    for c in charges:
        if c.noise:  # without any, epsilon is infinite
            refuse_charge(c)
        steps[c.noise, c.rate] = steps.get((c.noise, c.rate), 0) + c.steps
    return tuple(Charge(noise=noise, rate=rate, steps=n) for (noise, rate), n in sorted(steps.items()))


def epsilon(charges: Sequence[Charge], *, delta: float) -> float:
    """Return the epsilon of these charges at this delta: PRV's upper bound, or RDP's where PRV cannot be right."""
    return _epsilon(merge_charges(charges), delta=delta)


def prv(charges: Sequence[Charge], *, delta: float) -> float:
    """Return the epsilon by privacy loss random variables; inf where that fails, or would take minutes."""
    if delta < LEAST_DELTA or not _is_quick(charges, delta=delta):
        return inf
    try:
        with _no_warnings():
            return _composed(merge_charges(charges), delta=delta)
    except (ValueError, RuntimeError, OverflowError, MemoryError):
        return inf


def _composed(charges: Sequence[Charge], *, delta: float) -> float:
    """Return what Opacus's PRVAccountant does, to the last bit.

    That computes the Renyi divergences of every charge twice, which is most of its time: here they are remembered.
    """
    import numpy as np
    from opacus.accountants.analysis import prv as opacus  # here, as the import takes a second

    delta_error, steps = delta / 1000, [c.steps for c in charges]
    all_charges = rdp(charges, delta=delta_error / 4)
    single = [rdp([replace(c, steps=1)], delta=delta_error / (8 * sum(steps))) for c in charges]
    reach = max(all_charges, *single, EPSILON_ERROR) + 3
    mesh = EPSILON_ERROR / np.sqrt(sum(steps) * np.log(12 / delta_error) / 2)
    domain = opacus.Domain.create_aligned(-reach, reach, mesh)
    losses = [opacus.PoissonSubsampledGaussianPRV(c.rate, c.noise) for c in charges]
    cut = [opacus.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max) for loss in losses]
    discrete = [opacus.discretize(loss, domain) for loss in cut]
    whole: Any = opacus.compose_heterogeneous(dprvs=discrete, num_self_compositions=steps)
    return float(whole.compute_epsilon(delta, delta_error, EPSILON_ERROR)[2])


def _is_quick(charges: Sequence[Charge], *, delta: float) -> bool:
    """Does PRV take seconds for these charges, and no gigabytes? Its grid is known beforehand.

    Gopi et al. cut the losses off at RDP's epsilon for a small delta, and space the points by the number of steps.
    """
    merged = merge_charges(charges)
    if any(not LEAST <= c.noise <= WIDE for c in merged):
        return False
    reach = rdp(merged, delta=delta / 4000) + 3
    steps = sum(c.steps for c in merged)
    points = 2 * reach / EPSILON_ERROR * sqrt(steps * log(12000 / delta) / 2)
    return points <= MOST_POINTS and points * len(merged) <= MOST_WORK


def rdp(charges: Sequence[Charge], *, delta: float) -> float:
    """Return the epsilon by Renyi differential privacy."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    merged = merge_charges(charges)
    wide = any(c.noise > WIDE for c in merged)
    orders = WHOLE_ORDERS if wide else ORDERS
    total = [sum(values) for values in zip(*(_renyi(c, orders=orders) for c in merged), strict=True)]
    with _no_warnings():
        return float(get_privacy_spent(orders=list(orders), rdp=total, delta=delta)[0])


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep quiet that the best order is at the end of the list, which makes the bound looser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _renyi(charge: Charge, *, orders: tuple[float, ...]) -> list[float]:
    """Return the Renyi divergence of a charge at each order."""
    return [charge.steps * value for value in _renyi_of_a_step(charge.noise, charge.rate, orders)]


@cache
def _renyi_of_a_step(noise: float, rate: float, orders: tuple[float, ...]) -> tuple[float, ...]:
    from opacus.accountants.analysis.rdp import compute_rdp

    return tuple(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=list(orders)))


@cache
def _epsilon(charges: tuple[Charge, ...], *, delta: float) -> float:
    if not charges:
        return 0.0
    if any(c.noise <= 0 for c in charges):
        return inf
    tight, loose = prv(charges, delta=delta), rdp(charges, delta=delta)
    return max(0.0, tight if isfinite(tight) and tight <= loose + SLACK else loose)


def calibrate(*, target: float, delta: float, rate: float, steps: int) -> float:
    """Return the least noise, to a part in two hundred, with which these steps spend at most the target epsilon.

    Raises `PrivacyError` where no noise is enough.
    """
    return _calibrated(target=target, delta=delta, rate=rate, steps=steps)


@cache
def _calibrated(*, target: float, delta: float, rate: float, steps: int) -> float:
    def excess(noise: float) -> float:
        """The logarithm of epsilon over its target, which falls as noise grows; `epsilon` remembers what it is."""
        spent = epsilon([Charge(noise=noise, rate=rate, steps=steps)], delta=delta)
        return log(max(spent, 1e-9) / target)

    high = _guess(target=target, delta=delta, rate=rate, steps=steps)
    while excess(high) > 0:
        high *= 1.25
        if high > MOST:
            raise PrivacyError(
                f"dp.epsilon = {target:g} at delta = {delta:g} cannot be kept over {steps} steps at rate {rate:g}; "
                "ask for a larger epsilon, or for fewer steps"
            )
    low = high / 1.1
    while excess(low) <= 0 and low > 1e-2:
        high, low = low, low / 1.1
    while excess(high) < -TOLERANCE:
        middle = _secant(excess, low=low, high=high)
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return high


def _secant(excess: Callable[[float], float], *, low: float, high: float) -> float:
    """Return the noise at which the chord of `excess` over log(noise), nearly a straight line, is a little below 0."""
    below, above = excess(low), excess(high)
    share = min(0.95, max(0.05, below / (below - above) + 0.05))
    return exp(log(low) + (log(high) - log(low)) * share)


def _guess(*, target: float, delta: float, rate: float, steps: int) -> float:
    """Return noise of about the right size, by the central limit theorem of Gaussian DP: where the search begins."""
    from opacus.accountants.analysis.gdp import compute_eps_poisson

    noise = 0.4
    while noise < MOST:
        try:
            if compute_eps_poisson(steps=steps, noise_multiplier=noise, sample_rate=rate, delta=delta) <= target:
                break
        except (ValueError, OverflowError):
            pass  # too little noise for this formula
        noise *= 1.1
    return noise


def default_delta(delta: float, *, units: int, who: str) -> float:
    """Return the delta that is set, or else the default for so many units (records or clients).

    Raises `PrivacyError` for a delta of 1/units or more, which would let a whole unit be given away.
    """
    if delta >= 1 / units:
        raise PrivacyError(
            f"dp.delta = {delta:g} is not below 1/N = {1 / units:.2g} of {who}: it would allow one of them to be given "
            f"away whole; set {1 / (10 * units):.0e} or less"
        )
    return delta or min(1e-5, 1 / (10 * units))
