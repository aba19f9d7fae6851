"""Canaries: records that are easy to tell, some of them there and some not, and a bound on what they give away.

Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run (NeurIPS 2023),
https://arxiv.org/abs/2305.08846

    each of m canaries is a record of the client with probability 1/2;   from what the client sent, guess of r of them
    P(v guesses right) <= beta + 2 m delta max_i (P(W >= v - i) - beta) / i,
    W ~ Binomial(r, e^eps / (e^eps + 1)),   beta = P(W >= v)

An epsilon for which that is below 1 % is refuted with 99 % confidence. A canary's gradient is one number, far above the
clip, at a place of its own among those that are sent; the client's sampler draws it, its clip cuts it, its noise hides
it as any record's. One that is not there has a gradient of zero, so that nothing else tells who is in.

The bound is weak, as one run cannot tell much: of a sound client it is about a quarter of the true epsilon.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import nn

from fedlora.data.encoding import Example
from fedlora.jobs import Job, PrivacyTerms
from fedlora.models.model import Model
from fedlora.privacy.dpsgd import Engine, Mechanism
from fedlora.privacy.per_sample_gradients import Gradients, Learner, PerExample

from .statistics import Floats

CANARY = "canary"  # the key of an example that is one: its number, or -1
LOUD = 20.0  # the length of a canary's gradient, over the clip
GUESSES = (25, 50, 100, 200, 400)  # on either side; the best of them counts, and pays for being chosen
CONFIDENCE = 0.99


def examples(there: Sequence[bool]) -> list[Example]:
    """A canary each, with a gradient if it is there and with none if it is not."""
    return [{CANARY: torch.tensor(k if yes else -1)} for k, yes in enumerate(there)]


def places(job: Job, count: int, seed: int) -> NDArray[np.int64]:
    """Where each canary's number stands among all that the job trains; -1 where no shared one is left for it."""
    parts, begin = [np.empty(0, dtype=np.int64)], 0
    for s in job.trains:
        end = begin + sum(t.numel() for t in job.start.side(s).values())
        parts += [np.arange(begin, end)] if s in job.shares else []
        begin = end
    shared = np.concatenate(parts)
    some = np.random.default_rng(seed).choice(len(shared), min(count, len(shared)), replace=False)
    return np.concatenate([shared[some], np.full(count - len(some), -1, dtype=np.int64)])


def room(job: Job) -> int:
    """Numbers that the job shares of what it trains."""
    return sum(t.numel() for s in job.shares if s in job.trains for t in job.start.side(s).values())


def engine(
    mechanism: Mechanism, where: NDArray[np.int64]
) -> Callable[[Model, Sequence[nn.Parameter], PrivacyTerms], Engine]:
    """The mechanism's own engine, with an ear for canaries at these places."""

    def made(model: Model, parameters: Sequence[nn.Parameter], privacy: PrivacyTerms) -> Engine:
        own = mechanism.engine(model, parameters, privacy)
        return lambda m, ps: _Aviary(m, ps).over(own(m, ps), where, LOUD * privacy.clip)

    return made


class _Aviary:
    """An engine of single gradients that knows canaries, and leaves all other examples to another engine."""

    def __init__(self, model: Learner, parameters: Sequence[nn.Parameter]) -> None:
        self._shapes = [p.shape for p in parameters]
        self._ends = np.cumsum([p.numel() for p in parameters])
        self._device = parameters[0].device

    def over(self, inner: PerExample, where: NDArray[np.int64], size: float) -> Self:
        """With another engine, and with canaries at these places, of this size."""
        self._inner, self._where, self._size = inner, where, size
        return self

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        others = [i for i, e in enumerate(examples) if CANARY not in e]
        rows = [torch.zeros(len(examples), *shape, device=self._device) for shape in self._shapes]
        if others:
            for row, g in zip(rows, self._inner([examples[i] for i in others]), strict=True):
                row[others] = g.to(row.dtype)
        for i, e in enumerate(examples):
            if int(e.get(CANARY, -1)) >= 0 and (place := int(self._where[int(e[CANARY])])) >= 0:
                j = int(np.searchsorted(self._ends, place, side="right"))
                rows[j].view(len(examples), -1)[i, place - int(self._ends[j])] = self._size  # from its end
        return rows


def lower_bound(score: Floats, there: NDArray[np.bool_], delta: float, attacks: int = 1) -> float:
    """The least epsilon that goes with how well the score tells who is there; `attacks`: scores that are tried."""
    order, m, best = np.argsort(-score), len(score), 0.0
    tried = [k for k in GUESSES if 2 * k <= m]
    for k in tried:
        right = int(there[order[:k]].sum() + (~there[order[-k:]]).sum())
        best = max(best, _refuted(m, 2 * k, right, delta, (1 - CONFIDENCE) / (len(tried) * attacks)))
    return best


def _refuted(m: int, r: int, right: int, delta: float, p: float, most: float = 60.0) -> float:
    """Up to which epsilon so many right guesses are less likely than p."""

    def excess(epsilon: float) -> float:
        return _likely(m, r, right, epsilon, delta) - p

    if excess(0.0) >= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, most)) if excess(most) > 0 else most


def _likely(m: int, r: int, right: int, epsilon: float, delta: float) -> float:
    """The most that the chance of so many right guesses can be."""
    share = 1 / (1 + exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, r, share))
    i = np.arange(1, right + 1)
    steepest = float(np.max((stats.binom.sf(right - i - 1, r, share) - beta) / i, initial=0.0))
    return min(1.0, beta + 2 * m * delta * steepest)
