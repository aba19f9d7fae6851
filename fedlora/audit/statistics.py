"""The statistics of the audit's tests. Each test raises a false alarm once in a hundred thousand audits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy import fft, stats

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge
from fedlora.sections import PrivacyConfig

ALARM = 1e-5  # the chance of a false alarm, for each test
UNDER = 0.02  # how far an accountant's epsilon may be below that of the other, as both round
OVER = 2.0  # how many times that of the other it may be
FINE = 0.3  # noise from which on the independent accountant discretises losses to a thousandth
EXTREMES = 100  # pairs of samples at either end for which the exact chance of their overlap is calculated
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


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


def same_size_in_every_step(
    name: str, steps: Mapping[str, Mapping[str, tuple[float, int]]], *, deviation: float
) -> Finding:
    """T2: has every tensor in every single step noise of this standard deviation, by chi-square?

    `steps` holds for each step and tensor the sum of the squares of the noise, and how many numbers it is of.
    """
    sizes = {f"{where}, {step}": size for step, tensors in steps.items() for where, size in tensors.items()}
    squares, numbers = (np.array(column, dtype=np.float64) for column in zip(*sizes.values(), strict=True))
    p_values = _p_two_sided(squares / deviation**2, numbers)
    least = int(p_values.argmin())
    ratio = sqrt(squares[least] / numbers[least]) / deviation
    bound = ALARM / len(sizes)
    return Finding(
        name=f"T2 {name}, every step",
        passed=bool(p_values[least] > bound),
        measured=float(p_values[least]),
        unit="p",
        allowed=f"over {bound:.0e}",
        detail=f"least p of {len(sizes)} tensors of single steps; it is of {list(sizes)[least]}, whose noise is "
        f"{ratio:.3g} of its size",
    )


def _p_two_sided(squares: Floats, freedom: Floats) -> Floats:
    """Return the p-values of sums of squares of standard normal numbers, for too small and for too large a sum."""
    tails = np.minimum(stats.chi2.cdf(squares, freedom), stats.chi2.sf(squares, freedom))
    return np.asarray(2 * tails, dtype=np.float64)


def uncorrelated(which: str, vectors: Mapping[str, Floats], pairs: Sequence[tuple[str, str]]) -> Finding:
    """T3: are no two of these sets of numbers, of these pairs, correlated more than by chance?

    The correlation is the largest over all shifts of one along the other, so that a stream of random numbers which is
    taken up a few numbers later is found to be the same. A set may be paired with itself: then only shifts count.
    """
    n = fft.next_fast_len(max(map(len, vectors.values())), real=True)
    spectra = {name: np.fft.rfft(x / (np.linalg.norm(x) or 1.0), n) for name, x in vectors.items()}

    def deviations(first: str, second: str) -> float:
        root = sqrt(max(len(vectors[first]), len(vectors[second])))
        if not (vectors[first].any() and vectors[second].any()):
            return root  # zeros are no noise either
        correlations = np.abs(np.fft.irfft(spectra[first] * np.conj(spectra[second]), n))
        return float(correlations[int(first == second) :].max()) * root

    found = {pair: deviations(*pair) for pair in pairs}
    worst = max(found, key=lambda pair: found[pair])
    most = float(stats.norm.isf(ALARM / (2 * n * len(pairs))))
    return Finding(
        name=f"T3 noise, {which}",
        passed=found[worst] < most,
        measured=found[worst],
        unit="deviations",
        allowed=f"below {most:.2f}",
        detail=f"correlation at any shift, in standard deviations of what chance makes it, of {len(pairs)} pairs; the "
        f"most alike are {' and '.join(worst)}",
    )


def draws(name: str, samples: Sequence[Counts], *, rate: float) -> Iterator[Finding]:
    """T5: is every record drawn by itself, as often as any other, and anew in each step?

    `samples` holds for each client how often each of its records is in each step, (steps, records); all clients have
    as many records.
    """
    sizes = np.concatenate([sample.sum(1) for sample in samples]).astype(np.float64)
    yield poisson_sizes(name, sizes, n=samples[0].shape[1], rate=rate)
    yield drawn_alike(name, samples, rate=rate)
    yield drawn_anew(name, np.concatenate(samples))


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


def drawn_alike(name: str, samples: Sequence[Counts], *, rate: float) -> Finding:
    """T5: is each record drawn as often as a record should be, and no more than once in a step?

    Two p-values are combined: that of chi-square over all records, for many that are a little off, and the least of
    the binomial ones of single records, for one that is far off.
    """
    counts = [sample.sum(0) for sample in samples]
    steps = [len(sample) for sample in samples]
    together = _p_of_all_counts(counts, steps, rate=rate)
    single = [
        np.minimum(stats.binom.cdf(c, t, rate), stats.binom.sf(c - 1, t, rate))
        for c, t in zip(counts, steps, strict=True)
    ]
    least = np.concatenate(single)
    p = min(1.0, 2 * together, 4 * len(least) * float(least.min()))
    worst = int(least.argmin())
    often = int(np.concatenate(counts)[worst])
    twice = max(int(sample.max(initial=0)) for sample in samples)
    return Finding(
        name=f"T5 {name}, how often each",
        passed=p > ALARM and twice <= 1,
        measured=p,
        unit="p",
        allowed=f"over {ALARM:.0e}, once a step",
        detail=f"number {worst % samples[0].shape[1]} is off the most: drawn {often} times, where "
        f"{rate * steps[worst // samples[0].shape[1]]:.3g} are expected; in one step one was drawn {twice} times",
    )


def _p_of_all_counts(counts: Sequence[Counts], steps: Sequence[int], *, rate: float) -> float:
    """Return the two-sided p-value of chi-square over all counts, with the degrees of freedom of its true variance."""
    spread = rate * (1 - rate)
    if not spread:
        return 1.0
    chi_square = sum(float(((c - t * rate) ** 2).sum()) / (t * spread) for c, t in zip(counts, steps, strict=True))
    mean = sum(map(len, counts))
    variance = sum(len(c) * (2 + (1 - 6 * spread) / (t * spread)) for c, t in zip(counts, steps, strict=True))
    freedom = 2 * mean**2 / variance
    return float(_p_two_sided(np.array([chi_square * freedom / mean]), np.array([freedom]))[0])


def drawn_anew(name: str, sample: Counts) -> Finding:
    """T5: have no two steps more, or fewer, records in common than two independent samples of their sizes?

    The number in common is hypergeometric. Its exact chance is calculated for the pairs that are furthest off.
    """
    there = (sample > 0).astype(np.float64)  # (steps, records)
    n, first, second = there.shape[1], *np.triu_indices(len(there), 1)
    sizes, common = there.sum(1), (there @ there.T)[first, second]
    a, b = sizes[first], sizes[second]
    spread = np.sqrt(a * b * (n - a) * (n - b) / (n * n * max(n - 1, 1)))
    order = np.argsort((common - a * b / n) / np.maximum(spread, 1e-9))
    ends = np.unique(np.concatenate([order[:EXTREMES], order[-EXTREMES:]]))
    hypergeometric = stats.hypergeom(n, a[ends].astype(int), b[ends].astype(int))
    p_values = np.minimum(hypergeometric.cdf(common[ends]), hypergeometric.sf(common[ends] - 1))
    worst = ends[int(p_values.argmin())]
    p = min(1.0, 2 * len(order) * float(p_values.min()))
    return Finding(
        name=f"T5 {name}, steps apart",
        passed=p > ALARM,
        measured=p,
        unit="p",
        allowed=f"over {ALARM:.0e}",
        detail=f"of {len(order)} pairs of samples, {int(a[worst])} and {int(b[worst])} of {n} are furthest off: they "
        f"have {int(common[worst])} in common, where {a[worst] * b[worst] / n:.3g} are expected",
    )


def drawn_otherwise(name: str, sample: Counts, again: Counts, *, rate: float) -> Finding:
    """T5: if the same draws are made again, are they others? The number in common is then binomial."""
    common, trials = int(((sample > 0) & (again > 0)).sum()), sample.size
    p = 2 * min(float(stats.binom.cdf(common, trials, rate**2)), float(stats.binom.sf(common - 1, trials, rate**2)))
    return Finding(
        name=f"T5 {name}, done again",
        passed=p > ALARM,
        measured=min(1.0, p),
        unit="p",
        allowed=f"over {ALARM:.0e}",
        detail=f"{common} draws of {len(sample)} samples are made again, where {trials * rate**2:.4g} are expected",
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
