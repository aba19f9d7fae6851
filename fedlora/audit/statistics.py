"""The statistics of the audit's tests. Each test raises a false alarm once in a hundred thousand audits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge
from fedlora.sections import PrivacyConfig

ALARM = 1e-5  # the chance of a false alarm, for each test
UNDER = 0.02  # how far an accountant's epsilon may be below that of the other, as both round
OVER = 2.0  # how many times that of the other it may be
FINE = 0.3  # noise from which on the independent accountant discretises losses to a thousandth
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one test measured, and whether that is allowed."""

    name: str
    passed: bool
    measured: float
    unit: str
    allowed: str
    detail: str
    seconds: float = 0.0


def noise(name: str, tensors: Mapping[str, Floats], *, deviation: float) -> Iterator[Finding]:
    """T2: is every tensor normal, by Kolmogorov and Smirnov, and have all together this standard deviation?"""
    p_values = {where: _p_normal(x, deviation=deviation) for where, x in tensors.items()}
    where = min(p_values, key=lambda tensor: p_values[tensor])
    bound = ALARM / len(tensors)
    yield Finding(
        name=f"T2 {name}, shape",
        passed=p_values[where] > bound,
        measured=p_values[where],
        unit="p",
        allowed=f"over {bound:.0e}",
        detail=f"least p of {len(tensors)} tensors, each against N(0, {deviation:.3g}); it is of {where}",
    )
    every = np.concatenate(list(tensors.values()))
    low, high = (float(np.sqrt(stats.chi2.ppf(p, len(every)) / len(every))) for p in (ALARM / 2, 1 - ALARM / 2))
    ratio = float(np.sqrt(np.mean((every / deviation) ** 2)))
    yield Finding(
        name=f"T2 {name}, size",
        passed=low < ratio < high,
        measured=ratio,
        unit="of its size",
        allowed=f"{low:.3f} to {high:.3f}",
        detail=f"standard deviation of {len(every)} numbers over {deviation:.3g}, which it should be",
    )


def _p_normal(x: Floats, *, deviation: float) -> float:
    return float(stats.kstest(x, "norm", args=(0.0, deviation)).pvalue)


def uncorrelated(which: str, x: Floats, y: Floats) -> Finding:
    """T3: are two sets of numbers correlated no more than by chance?

    The correlation is the largest over all shifts of one along the other, so that a stream of random numbers which is
    taken up a few numbers later is found to be the same.
    """
    n = max(len(x), len(y))
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    correlations = np.fft.irfft(np.fft.rfft(x, n) * np.conj(np.fft.rfft(y, n)), n)
    z = float(np.abs(correlations).max() * np.sqrt(n) / length) if length else sqrt(n)  # zeros are no noise either
    most = float(stats.norm.isf(ALARM / (2 * n)))
    return Finding(
        name=f"T3 noise, {which}",
        passed=z < most,
        measured=z,
        unit="deviations",
        allowed=f"below {most:.2f}",
        detail="correlation at any shift, in standard deviations of what chance makes it",
    )


def poisson_sizes(name: str, sizes: Floats, *, n: int, rate: float) -> Finding:
    """T5: are these the sizes of Poisson samples of n? The sizes of batches that are dealt out vary less.

    The bounds are chi-square's, with fewer degrees of freedom where few are drawn and the binomial has heavier tails.
    """
    mean, variance, samples = n * rate, n * rate * (1 - rate), len(sizes)
    low = high = 0.0
    if variance:
        freedom = 2 / (2 / (samples - 1) + (1 - 6 * rate * (1 - rate)) / variance / samples)
        low, high = (variance * float(stats.chi2.ppf(p, freedom)) / freedom for p in (ALARM / 2, 1 - ALARM / 2))
    measured = float(sizes.var(ddof=1))
    off = abs(float(sizes.mean()) - mean)
    most_off = float(stats.norm.isf(ALARM / 2)) * sqrt(variance / samples)
    return Finding(
        name=f"T5 {name} sizes",
        passed=low <= measured <= high and off <= most_off,
        measured=measured,
        unit="variance",
        allowed=f"{low:.3g} to {high:.3g}",
        detail=f"variance of {samples} sizes, of which the mean is {sizes.mean():.2f} and should be {mean:.2f}",
    )


def accounted(said: float, dp: PrivacyConfig, charge: Charge, *, delta: float) -> Finding:
    """T4: is the epsilon said what another accountant makes of the observed steps, and no more than promised?"""
    other = epsilon(charge, delta=delta)
    promised = inf if dp.noise else dp.epsilon  # noise that is set is for more steps than the audit's
    least, most = other - UNDER, min(promised * (1 + 1e-6), OVER * other + UNDER)
    return Finding(
        name="T4 epsilon",
        passed=least <= said <= most,
        measured=said,
        unit="by the ledger",
        allowed=f"{least:.2f} to {most:.2f}",
        detail=f"epsilon as it is told; another accountant makes {other:.3f} of the {charge.steps} steps seen",
    )


def epsilon(charge: Charge, *, delta: float) -> float:
    """Return the epsilon by Google's accountant, which shares no code with the ledger's.

    Raises `PrivacyError` where it is not installed.
    """
    try:
        from dp_accounting import NeighboringRelation, dp_event, pld
    except ImportError as e:
        raise PrivacyError("the audit needs a second accountant: pip install 'fedlora[dev]'") from e
    step = dp_event.PoissonSampledDpEvent(charge.rate, dp_event.GaussianDpEvent(charge.noise))
    interval = 1e-3 if charge.noise >= FINE else 1e-2
    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    return float(accountant.compose(step, charge.steps).get_epsilon(delta))
