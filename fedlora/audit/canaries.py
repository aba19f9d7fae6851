"""Canaries: records that are easy to recognise, some present and some not, and the bound on epsilon they give.

Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run (NeurIPS 2023),
https://arxiv.org/abs/2305.08846

    each of m canaries is a record of the client with probability 1/2;   from what the client sent, guess of r of them
    P(v guesses right) <= beta + 2 m delta max_i (P(W >= v - i) - beta) / i,
    W ~ Binomial(r, e^eps / (e^eps + 1)),   beta = P(W >= v)

An epsilon for which this is below 1 % is refuted with 99 % confidence. A canary's gradient is one number, far above the
clip, at a place of its own among the numbers that are sent; the client's sampler draws it, its clip cuts it and its
noise hides it like any record's. A canary that is not present has a gradient of zero, so that nothing else tells which
are present.

The bound is weak, as one run cannot tell much: for a sound client it is about a quarter of the true epsilon.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor, nn

from fedlora.client.stacked.layout import layout_of
from fedlora.encoding.encoder import Example, Records
from fedlora.jobs import Job, PrivacyTerms, shared_start
from fedlora.lora import LoRA, from_matrices
from fedlora.models.model import Model
from fedlora.privacy.dpsgd import Engine, Mechanism, RowGradients
from fedlora.privacy.per_sample_gradients import Gradients, Learner, PerExample

from .statistics import Floats

CANARY = "canary"  # the key of an example that is one: its number, or -1
LOUD = 20.0  # the length of a canary's gradient, over the clip
GUESSES = (25, 50, 100, 200, 400)  # on either side; the best of them counts, and is corrected for having been chosen
CONFIDENCE = 0.99


def examples(there: Sequence[bool]) -> list[Example]:
    """Return a canary for each entry, with a gradient if it is present and with a gradient of zero if it is not."""
    return [{CANARY: torch.tensor(k if present else -1)} for k, present in enumerate(there)]


def places(job: Job, count: int, seed: int) -> NDArray[np.int64]:
    """Return the place of each canary's number among all that the job trains, (count,); -1 where no place is left.

    Places are drawn among the numbers that the job also shares.
    """
    parts, begin, sent = [np.empty(0, dtype=np.int64)], 0, shared_start(job)
    for s in job.trains:
        for m, t in job.start.side(s).items():
            here = np.arange(begin, begin + t.numel()).reshape(t.shape)
            parts += [here[tuple(map(slice, sent.side(s)[m].shape))].flatten()] if s in job.shares else []
            begin += t.numel()
    shared = np.concatenate(parts)
    chosen = np.random.default_rng(seed).choice(len(shared), min(count, len(shared)), replace=False)
    return np.concatenate([shared[chosen], np.full(count - len(chosen), -1, dtype=np.int64)])


def room(job: Job) -> int:
    """Return how many numbers the job both trains and shares: there may be as many canaries."""
    return shared_start(job).only("".join(set(job.shares) & set(job.trains))).numel()


def engine(
    mechanism: Mechanism, job: Job, where: NDArray[np.int64], see: Callable[[Sequence[Example]], None] = lambda _: None
) -> Callable[[Model, Sequence[nn.Parameter], PrivacyTerms], Engine]:
    """Return the mechanism's choice of an engine, wrapped so that it knows canaries at these places.

    `see` is called with the examples of every micro-batch. In a step that trains some of the job's sides alone, the
    canaries of the others have no gradient.
    """

    def made(model: Model, parameters: Sequence[nn.Parameter], privacy: PrivacyTerms) -> Engine:
        own = mechanism.engine(model, parameters, privacy)
        every = [p for side in job.trains for p in model.parameters_of(side)]
        begins = dict(zip(map(id, every), np.cumsum([0, *(p.numel() for p in every)]).tolist(), strict=False))
        of_step = np.array([begins[id(p)] for p in parameters])
        return lambda m, ps: _WithCanaries(m, ps).around(own(m, ps), where, of_step, size=LOUD * privacy.clip, see=see)

    return made


def rows(
    mechanism: Mechanism,
    job: Job,
    where: NDArray[np.int64],
    records: Records,
    see: Callable[[Sequence[Example]], None] = lambda _: None,
) -> Callable[[RowGradients], RowGradients]:
    """Return what a client's mechanism does with the gradients of a pass, knowing the canaries among its records.

    `see` is called with the client's own examples of every micro-batch.
    """
    assert job.privacy
    size, columns, own = LOUD * job.privacy.clip, _columns(job), {id(e) for record in records for e in record}

    def around(inner: RowGradients) -> RowGradients:
        further = mechanism.rows(inner)

        def gradients(examples: Sequence[Example], owner: Tensor) -> Tensor:
            see([e for e in examples if id(e) in own])
            others = [i for i, e in enumerate(examples) if not (CANARY in e and id(e) in own)]
            found = torch.zeros(len(examples), len(columns), device=owner.device)
            if others:
                found[others] = further([examples[i] for i in others], owner[others]).to(found.dtype)
            for i in set(range(len(examples))) - set(others):
                if (number := int(examples[i][CANARY])) >= 0 and where[number] >= 0:
                    found[i, columns[where[number]]] = size
            return found

        return gradients

    return around


def _columns(job: Job) -> NDArray[np.int64]:
    """The column, in the rows of a pass, of every number that the job trains, in the order of `places`."""
    numbered, begin = [], 0
    for side in job.trains:
        for module, t in job.start.side(side).items():
            numbered.append((side, module, torch.arange(begin, begin + t.numel()).view(t.shape)))
            begin += t.numel()
    layout = layout_of([job.start], job.trains)
    order = layout.flat(from_matrices(numbered), LoRA(), torch.float64)[: layout.trained]
    return np.argsort(order.numpy())


class _WithCanaries:
    """An engine of single gradients that makes those of canaries, and leaves all other examples to another engine."""

    def __init__(self, model: Learner, parameters: Sequence[nn.Parameter]) -> None:
        self._shapes = [p.shape for p in parameters]
        self._device = parameters[0].device

    def around(
        self,
        inner: PerExample,
        where: NDArray[np.int64],
        begins: NDArray[np.int64],
        *,
        size: float,
        see: Callable[[Sequence[Example]], None],
    ) -> Self:
        """Set the engine for all other examples, the places and the gradient's size of canaries, and who looks on.

        `begins` has the place at which each parameter's numbers begin, in rising order.
        """
        self._inner, self._where, self._begins, self._size, self._see = inner, where, begins, size, see
        return self

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        self._see(examples)
        gradients = [torch.zeros(len(examples), *shape, device=self._device) for shape in self._shapes]
        self._fill_in_others(gradients, examples)
        for i, e in enumerate(examples):
            place = self._place(e)
            j = int(np.searchsorted(self._begins, place, side="right")) - 1
            own = gradients[j].view(len(examples), -1)[i]
            if 0 <= place - int(self._begins[j]) < len(own):
                own[place - int(self._begins[j])] = self._size
        return gradients

    def _fill_in_others(self, gradients: Gradients, examples: Sequence[Example]) -> None:
        others = [i for i, e in enumerate(examples) if CANARY not in e]
        if not others:
            return
        for gradient, g in zip(gradients, self._inner([examples[i] for i in others]), strict=True):
            gradient[others] = g.to(gradient.dtype)

    def _place(self, example: Example) -> int:
        """Return where a canary's number stands; -1 for an example that is none, or is not present."""
        number = int(example.get(CANARY, -1))
        return int(self._where[number]) if number >= 0 else -1


def lower_bound(score: Floats, there: NDArray[np.bool_], *, delta: float, attacks: int = 1) -> float:
    """Return the largest epsilon that is refuted by how well the score tells which canaries are present.

    `attacks` is the number of scores that are tried on the same canaries.
    """
    order, m = np.argsort(-score), len(score)
    tried = [k for k in GUESSES if 2 * k <= m]
    p = (1 - CONFIDENCE) / (max(len(tried), 1) * attacks)
    bounds = [0.0]
    for k in tried:
        right = int(there[order[:k]].sum() + (~there[order[-k:]]).sum())
        bounds.append(_refuted(m=m, r=2 * k, right=right, delta=delta, p=p))
    return max(bounds)


def _refuted(*, m: int, r: int, right: int, delta: float, p: float, most: float = 60.0) -> float:
    """Return the epsilon, at most `most`, up to which so many right guesses are less likely than p."""

    def excess(epsilon: float) -> float:
        return _likely(m=m, r=r, right=right, epsilon=epsilon, delta=delta) - p

    if excess(0.0) >= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, most)) if excess(most) > 0 else most


def _likely(*, m: int, r: int, right: int, epsilon: float, delta: float) -> float:
    """Return the bound on the chance of so many right guesses."""
    share = 1 / (1 + exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, r, share))
    i = np.arange(1, right + 1)
    steepest = float(np.max((stats.binom.sf(right - i - 1, r, share) - beta) / i, initial=0.0))
    return min(1.0, beta + 2 * m * delta * steepest)
