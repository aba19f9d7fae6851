"""What is known of a mean over seeds, and of the difference of two lines.

Two lines are held together where they have most in common: the same seed, so the same start, the same rows held out
and the same draws, and the same example of the test split. Their difference varies with the seed and with the example,
and both count, as a claim is about other seeds and other examples (a crossed design of two random effects):

    d[s, i] = mu + seed_s + example_i + rest[s, i],    var(mean d) = (MS_seed + MS_example - MS_rest) / (S n)

with Student's t at Satterthwaite's degrees of freedom. Of one seed the interval is over examples alone, and says
nothing about another seed; where the test split differs from seed to seed it is over seeds alone.
"""

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95
WITHIN = 0.05  # p, after Holm's correction, below which a difference is marked


class Interval(NamedTuple):
    """A mean over seeds, and half of the width of its 95 % confidence interval; of one seed None."""

    mean: float
    half: float | None
    seeds: int


class Difference(NamedTuple):
    """The mean of a line less that of another, with half of its 95 % confidence interval."""

    mean: float
    half: float
    p: float  # of a difference as large without any, on two sides
    over: str  # what the interval is over: seeds and examples, examples, or seeds


def interval(values: Sequence[float]) -> Interval:
    """The mean with Student's confidence interval: with three seeds 2.5 standard deviations to either side."""
    n = len(values)
    half = _quantile(n - 1) * stdev(values) / sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


def difference(one: Mapping[int, Sequence[float]], other: Mapping[int, Sequence[float]], same: bool) -> Difference:
    """The difference of two lines, by their figures of every example for each seed; of seeds that both have.

    `same`: is the test split the same for all seeds?
    """
    seeds = sorted({*one} & {*other})
    if len(seeds) == 1 or same:
        d = np.array([np.subtract(one[seed], other[seed]) for seed in seeds])  # (seeds, examples)
        return _over_examples(d[0]) if len(seeds) == 1 else _over_both(d)
    means = [fmean(one[seed]) - fmean(other[seed]) for seed in seeds]
    return _of_mean(fmean(means), stdev(means) ** 2 / len(means), len(means) - 1, "seeds")


def _over_examples(d: Any) -> Difference:
    return _of_mean(float(d.mean()), float(d.var(ddof=1)) / len(d), len(d) - 1, "examples")


def _over_both(d: Any) -> Difference:
    seeds, examples = d.shape
    by_seed, by_example, mean = d.mean(1, keepdims=True), d.mean(0, keepdims=True), float(d.mean())
    rest = d - by_seed - by_example + mean
    ms_seed = examples * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    ms_example = seeds * float(((by_example - mean) ** 2).sum()) / (examples - 1)
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (examples - 1))
    total = max(ms_seed + ms_example - ms_rest, ms_seed, ms_example)  # no component is below zero
    of_estimate = ms_seed**2 / (seeds - 1) + ms_example**2 / (examples - 1)
    of_estimate += ms_rest**2 / ((seeds - 1) * (examples - 1))
    freedom = total**2 / of_estimate if of_estimate else 1.0
    return _of_mean(mean, total / (seeds * examples), freedom, "seeds and examples")


def _of_mean(mean: float, variance: float, freedom: float, over: str) -> Difference:
    """A mean difference with its interval, by the variance of the mean."""
    if not variance:
        return Difference(mean, 0.0, 0.0 if mean else 1.0, over)
    error = sqrt(variance)
    return Difference(mean, _quantile(freedom) * error, 2 * float(student.sf(abs(mean) / error, freedom)), over)


def _quantile(freedom: float) -> float:
    return float(student.ppf((1 + LEVEL) / 2, freedom)) if freedom > 0 else inf


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several comparisons after Holm's correction, by which one false finding among all is as rare."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, largest = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[i]))
        corrected[i] = largest
    return corrected
