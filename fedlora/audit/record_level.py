"""Tests of record-level privacy: the sensitivity to one record, the noise, the draws, the ledger, and an attack.

Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run (NeurIPS 2023),
https://arxiv.org/abs/2305.08846, is the attack. The other tests examine the parts that the guarantee is made of, and
catch what an attack is too weak to see.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from fedlora.jobs import Charge

from . import canaries, statistics
from .answers import answers
from .observer import ObservedRound, ObservedStep
from .sensitivity import sensitivity
from .statistics import Finding, Floats
from .subject import ROUNDS, STEPS, MadeUpClient, RecordLevelSetting, RecordLevelSubject, play

NULLS = 16  # records without a gradient, of a client whose noise is examined
Test = Callable[[RecordLevelSetting, RecordLevelSubject], Iterator[Finding]]


def noise(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T2, T3, T7, T8: where all gradients are zero, is the rest normal noise of the right size, drawn afresh each time?

    T2 holds the noise of each round against N(0, sigma C) by Kolmogorov and Smirnov, tensor by tensor, the size of all
    of it, and that of each tensor in every single step. T3 holds the noise of each step against that of every other
    step, of either client, in all rounds and in a first round that is done again. T7 asks each job of that round twice.
    T8 compares the seeds of dropout.
    """
    with TemporaryDirectory() as folder:
        empty = [MadeUpClient(setting.model.encoder, (), examples=canaries.examples([False] * NULLS)) for _ in range(2)]
        seen = play(setting, subject, empty, Path(folder) / "once")
        again = play(setting, subject, empty, Path(folder) / "again", rounds=1, asked_twice=True)
    p = setting.privacy
    tensors: dict[str, Floats] = {}
    for x in seen:
        for (s, m), t in x.sums.items():
            taken = sum((s, m) in step.squares for step in x.steps)  # fewer than all where sides are trained in turn
            tensors[f"{s} of {m}, {x.name}"] = t.flatten().numpy() * sqrt(STEPS / max(1, taken))
    yield from statistics.noise("noise", tensors, deviation=p.noise * p.clip * sqrt(STEPS))
    steps = {f"{x.name}, step {k + 1}": _sizes(step) for x in seen for k, step in enumerate(x.steps)}
    yield statistics.same_size_in_every_step("noise", steps, deviation=p.noise * p.clip)
    yield from _compared(seen, again)
    yield _asked_twice(again)
    yield _dropout([x for x in (*seen, *again) if x.client == 0 or not setting.stacked])  # one seed is a whole pass's


def training(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T4, T5, T6: in a whole run of a client with canaries and one without, are epsilon, draws and uploads sound?

    T4: is the ledger's epsilon what another accountant makes of the observed steps? T5: is every record drawn by
    itself, and in a first round that is done again too? T6: is the epsilon that canaries refute below the ledger's?
    """
    there = np.random.default_rng(setting.seed).random(setting.canaries) < 0.5
    present = (there.tolist(), [False] * setting.canaries)
    examples = [[*setting.made_up[i], *canaries.examples(those)] for i, those in enumerate(present)]
    clients_data = [MadeUpClient(setting.model.encoder, (), examples=own) for own in examples]
    with TemporaryDirectory() as folder:
        seen = play(setting, subject, clients_data, Path(folder) / "once")
        again = play(setting, subject, clients_data, Path(folder) / "again", rounds=1)
    yield _accounted(setting, [s for s in seen if s.client == 0])
    samples = [np.concatenate([s.times for s in rounds if s.client == i]) for rounds in (seen, again) for i in range(2)]
    yield from statistics.draws("batch", samples, rate=setting.privacy.rate)
    yield _attacked(setting, seen, there)


TESTS: tuple[Test, ...] = (sensitivity, noise, training, answers)


def _sizes(step: ObservedStep) -> dict[str, tuple[float, int]]:
    return {f"{s} of {m}": size for (s, m), size in step.squares.items()}


def _compared(seen: Sequence[ObservedRound], again: Sequence[ObservedRound]) -> Iterator[Finding]:
    """T3: is the noise of any two steps correlated, of whatever client, round and run?"""
    steps: dict[str, tuple[bool, ObservedRound, ObservedStep]] = {}
    for repeated, rounds in ((False, seen), (True, again)):
        for x in rounds:
            for k, step in enumerate(x.steps):
                steps[f"{x.name}, step {k + 1}{', done again' if repeated else ''}"] = (repeated, x, step)
    pairs: dict[str, list[tuple[str, str]]] = {"two clients": [], "two rounds": [], "two steps": [], "done again": []}
    for first, second in combinations_with_replacement(steps, 2):
        (repeated, x, _), (repeats, y, _) = steps[first], steps[second]
        pairs[_relation(x, y, apart=repeated != repeats)].append((first, second))
    vectors = {name: step.numbers for name, (_, _, step) in steps.items()}
    for relation, those in pairs.items():
        yield statistics.uncorrelated(relation, vectors, those)


def _relation(x: ObservedRound, y: ObservedRound, *, apart: bool) -> str:
    """Return what two steps have in common, by their rounds; `apart` are those of two runs."""
    if apart:
        return "done again"
    if x.client != y.client:
        return "two clients"
    return "two steps" if x.job.round == y.job.round else "two rounds"


def _asked_twice(seen: Sequence[ObservedRound]) -> Finding:
    """T7: does a job that is asked again get the same answer, for no further charge and without training?"""
    again = [x.again for x in seen if x.again]
    wrong = sum(not a.same or bool(a.steps) or bool(a.charges) for a in again)
    return Finding(
        name="T7 asked twice",
        passed=not wrong,
        measured=float(wrong),
        unit="answers",
        allowed="none that differs",
        detail=f"of {len(again)} jobs that were asked twice, {sum(not a.same for a in again)} have another answer the "
        f"second time, after {sum(a.steps for a in again)} more steps and {sum(a.charges for a in again)} more charges",
    )


def _dropout(seen: Sequence[ObservedRound]) -> Finding:
    """T8: does dropout draw from another seed in every job?"""
    same = len(seen) - len({x.dropout_seed for x in seen})
    return Finding(
        name="T8 dropout seeds",
        passed=not same,
        measured=float(same),
        unit="used before",
        allowed="none",
        detail=f"seeds of dropout in {len(seen)} jobs, of two clients, several rounds and a round that is done again",
    )


def _accounted(setting: RecordLevelSetting, seen: Sequence[ObservedRound]) -> Finding:
    """T4: is the ledger's epsilon, after all rounds of one client, that of its steps?"""
    p = setting.privacy
    charge = Charge(noise=p.noise, rate=p.rate, steps=sum(len(s.steps) for s in seen))
    return statistics.accounted(seen[-1].epsilon, setting.config.dp, charge, delta=p.delta)


def _attacked(setting: RecordLevelSetting, seen: Sequence[ObservedRound], there: NDArray[np.bool_]) -> Finding:
    """T6: is the epsilon that canaries refute, by what the client with canaries sent, below the ledger's?"""
    by_round = {(s.client, s.job.round): s for s in seen}
    own, difference = np.zeros(len(there)), np.zeros(len(there))
    for t in range(ROUNDS):
        first, second = by_round[0, t], by_round[1, t]
        where = canaries.places(first.job, setting.canaries, setting.seed)
        own += np.where(where >= 0, first.visible_vector[where], 0.0)
        difference += np.where(where >= 0, first.visible_vector[where] - second.visible_vector[where], 0.0)
    said = by_round[0, ROUNDS - 1].epsilon
    bounds = [canaries.lower_bound(score, there, delta=setting.privacy.delta, attacks=2) for score in (own, difference)]
    return Finding(
        name="T6 canaries",
        passed=max(bounds) <= said,
        measured=max(bounds),
        unit="lower bound",
        allowed=f"at most {said:.2f}",
        detail=f"epsilon is at least this, by {len(there)} canaries: {bounds[0]:.2f} from the client's uploads, "
        f"{bounds[1]:.2f} with the other client's taken off",
    )
