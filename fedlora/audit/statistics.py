"""What the tests of the audit reckon with. Each raises a false alarm once in a hundred thousand runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge
from fedlora.sections import PrivacyConfig

ALARM = 1e-5  # the chance of a false alarm, of each test
UNDER, OVER = 0.02, 2.0  # what an accountant may say less than the other one, as both round, and times more
FINE = 0.3  # noise from which on the losses of the independent accountant are told apart to a thousandth
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What one test measured, and whether that may be."""

    name: str
    passed: bool
    measured: float
    unit: str
    allowed: str
    detail: str
    seconds: float = 0.0


def noise(of: str, tensors: Mapping[str, Floats], deviation: float) -> Iterator[Finding]:
    """T2: are these normal, tensor by tensor by Kolmogorov and Smirnov, and of this deviation altogether?"""
    least, where = min((float(stats.kstest(x, "norm", args=(0.0, deviation)).pvalue), m) for m, x in tensors.items())
    bound, every = ALARM / len(tensors), np.concatenate(list(tensors.values()))
    detail = f"least p of {len(tensors)} tensors, each against N(0, {deviation:.3g}); it is of {where}"
    yield Finding(f"T2 {of}, shape", least > bound, least, "p", f"over {bound:.0e}", detail)
    low, high = (float(np.sqrt(stats.chi2.ppf(p, len(every)) / len(every))) for p in (ALARM / 2, 1 - ALARM / 2))
    ratio = float(np.sqrt(np.mean((every / deviation) ** 2)))
    detail = f"standard deviation of {len(every)} numbers over {deviation:.3g}, which it should be"
    yield Finding(f"T2 {of}, size", low < ratio < high, ratio, "of its size", f"{low:.3f} to {high:.3f}", detail)


def apart(which: str, x: Floats, y: Floats) -> Finding:
    """T3: do two sets of numbers go together no more than chance lets them?

    It is the largest over all shifts of one along the other: a stream that is taken up a few numbers later is the same.
    """
    n = max(len(x), len(y))
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    both = np.fft.irfft(np.fft.rfft(x, n) * np.conj(np.fft.rfft(y, n)), n)
    z = float(np.abs(both).max() * np.sqrt(n) / length) if length else sqrt(n)  # silence is no noise either
    most = float(stats.norm.isf(ALARM / (2 * n)))
    detail = "correlation at any shift, in standard deviations of what chance makes it"
    return Finding(f"T3 noise, {which}", z < most, z, "deviations", f"below {most:.2f}", detail)


def drawn(what: str, sizes: Floats, n: int, rate: float) -> Finding:
    """T5: are these the sizes of Poisson samples of n? Of batches that are dealt out they do not vary as they should.

    The bounds are chi-square's, with fewer degrees of freedom where few are drawn and the binomial has heavier tails.
    """
    variance, steps, low, high = n * rate * (1 - rate), len(sizes), 0.0, 0.0
    off = abs(float(sizes.mean()) - n * rate)
    if variance:
        freedom = 2 / (2 / (steps - 1) + (1 - 6 * rate * (1 - rate)) / variance / steps)
        low, high = (variance * float(stats.chi2.ppf(p, freedom)) / freedom for p in (ALARM / 2, 1 - ALARM / 2))
    seen, most = float(sizes.var(ddof=1)), float(stats.norm.isf(ALARM / 2)) * sqrt(variance / steps)
    detail = f"variance of {steps} sizes, of which the mean is {sizes.mean():.2f} and should be {n * rate:.2f}"
    good = low <= seen <= high and off <= most
    return Finding(f"T5 {what} sizes", good, seen, "variance", f"{low:.3g} to {high:.3g}", detail)


def accounted(said: float, dp: PrivacyConfig, charge: Charge, delta: float) -> Finding:
    """T4: is an epsilon what another accountant makes of the steps that were seen, and no more than was promised?"""
    other, promised = epsilon(charge, delta), inf if dp.noise else dp.epsilon  # of noise that is given, for more steps
    most = min(promised * (1 + 1e-6), OVER * other + UNDER)
    detail = f"epsilon as it is told; another accountant makes {other:.3f} of the {charge.steps} steps that were seen"
    good, allowed = other - UNDER <= said <= most, f"{other - UNDER:.2f} to {most:.2f}"
    return Finding("T4 epsilon", good, said, "by the ledger", allowed, detail)


def epsilon(charge: Charge, delta: float) -> float:
    """By Google's accountant, which shares nothing with the ledger's. Raises `PrivacyError` where it is not there."""
    try:
        from dp_accounting import NeighboringRelation, dp_event, pld
    except ImportError as e:
        raise PrivacyError("the audit needs a second accountant: pip install 'fedlora[dev]'") from e
    step = dp_event.PoissonSampledDpEvent(charge.rate, dp_event.GaussianDpEvent(charge.noise))
    interval = 1e-3 if charge.noise >= FINE else 1e-2
    accountant = pld.PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    return float(accountant.compose(step, charge.steps).get_epsilon(delta))
