"""Tests of record-level privacy: the sensitivity to one record, the noise, the draws, the ledger, and an attack.

Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run (NeurIPS 2023),
https://arxiv.org/abs/2305.08846, is the attack. The other tests examine the parts that the guarantee is made of, and
catch what an attack is too weak to see.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.client import training as local_training
from fedlora.data.encoding import Example
from fedlora.jobs import Charge, Job
from fedlora.lora import LoRA
from fedlora.messages.sketch import select_rows
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import Mechanism
from fedlora.privacy.noise import SecureRandom
from fedlora.sections import Training
from fedlora.seeds import seeded

from . import canaries, statistics
from .statistics import Finding, Floats
from .subject import ROUNDS, STEPS, MadeUpClient, ObservedRound, RecordLevelSetting, RecordLevelSubject, as_vector, play

NO_CLIP = 1e9  # a clip that cuts nothing
LEAST_CLIP = 1e-12  # for gradients of zero
NULLS = 16  # records without a gradient, of a client whose noise is examined
Test = Callable[[RecordLevelSetting, RecordLevelSubject], Iterator[Finding]]


def sensitivity(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T1: without noise, how far does one record more or less move the sum of a step, over the clip?

    The sum is over all trained parameters, sent or not, and is read off the model itself. The clips that are tried cut
    all records, some of them, and none.
    """
    silent = replace(subject.mechanism, draw=_everyone, add_noise=_silently)
    records = setting.made_up(0)
    tried = [_largest_change(setting, job, silent, records) for job in _jobs(setting)]
    worst = max(tried, key=lambda change: change.over_clip)
    allowed = preflight.OVER[setting.model.net.dtype.itemsize >= 4]
    yield Finding(
        name="T1 sensitivity",
        passed=worst.over_clip <= allowed,
        measured=worst.over_clip,
        unit="C",
        allowed=f"at most {allowed:g}",
        detail=f"most that one record moves a sum, over C; at C = {worst.clip:.2g}, with gradients of "
        f"{worst.shortest:.2g} to {worst.longest:.2g}, over the sides {worst.sides}",
    )


def noise(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T2, T3: where all gradients are zero, is the rest normal noise of the right size, and drawn afresh each time?

    T2 holds the noise against N(0, sigma C) by Kolmogorov and Smirnov, tensor by tensor, and the size of all of it. T3
    holds the noise of two clients against each other, that of two rounds, and that of a round which is done again.
    """
    with TemporaryDirectory() as folder:
        empty = [MadeUpClient(setting.model.encoder, (), examples=canaries.examples([False] * NULLS)) for _ in range(2)]
        seen = play(setting, subject, empty, Path(folder) / "once", rounds=2)
        again = play(setting, subject, empty, Path(folder) / "again", rounds=1)
    p = setting.privacy
    tensors: dict[str, Floats] = {}
    for x in seen:
        for (s, m), t in x.sums.items():
            tensors[f"{s} of {m}, client {x.client}, round {x.job.round + 1}"] = t.flatten().numpy()
    yield from statistics.noise("noise", tensors, deviation=p.noise * p.clip * sqrt(STEPS))
    yield statistics.uncorrelated("two clients", seen[0].vector, seen[1].vector)
    yield statistics.uncorrelated("two rounds", seen[0].vector, seen[2].vector)
    yield statistics.uncorrelated("done again", seen[0].vector, again[0].vector)


def training(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T4, T5, T6: in a whole run of a client with canaries and one without, are epsilon, draws and uploads sound?

    T4: is the ledger's epsilon what another accountant makes of the observed steps? T5: is every record drawn by
    itself? T6: is the epsilon that canaries refute below the ledger's?
    """
    there = np.random.default_rng(setting.seed).random(setting.canaries) < 0.5
    present = (there.tolist(), [False] * setting.canaries)
    examples = [[*setting.made_up(i), *canaries.examples(those)] for i, those in enumerate(present)]
    clients_data = [MadeUpClient(setting.model.encoder, (), examples=own) for own in examples]
    with TemporaryDirectory() as folder:
        seen = play(setting, subject, clients_data, Path(folder))
    yield _accounted(setting, [s for s in seen if s.client == 0])
    yield statistics.poisson_sizes(
        "batch", np.concatenate([s.drawn for s in seen]), n=setting.records, rate=setting.privacy.rate
    )
    yield _attacked(setting, seen, there)


TESTS: tuple[Test, ...] = (sensitivity, noise, training)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """The largest change of a step's sum by one record."""

    over_clip: float
    clip: float
    shortest: float  # norms of the gradients of single records
    longest: float
    sides: str


def _jobs(setting: RecordLevelSetting) -> list[Job]:
    """Return a job for every set of sides that the strategy trains in the first two rounds, with no factor at zero."""
    state, jobs = setting.strategy.init(setting.start), dict[str, Job]()
    for _ in range(2):
        job = select_rows(setting.strategy.client_init(state, setting.client))
        with seeded(7):
            jobs.setdefault(job.trains, replace(job, start=preflight.random_start(job.start)))
        state = setting.strategy.aggregate(state, [job.start.only(job.shares)], [1.0])
    return list(jobs.values())


def _largest_change(setting: RecordLevelSetting, job: Job, mechanism: Mechanism, records: Sequence[Example]) -> _Change:
    """Return the largest change, over several clips, of the sum when one record is left out."""
    norms = [float(np.linalg.norm(_step(setting, job, mechanism, [e], clip=NO_CLIP, unit=1.0))) for e in records]
    shortest, longest = min(norms), max(norms)
    clips = [shortest / 100, *np.quantile(norms, [0.25, 0.5, 0.75]).tolist(), 100 * longest]

    def over(clip: float) -> float:
        whole = _step(setting, job, mechanism, records, clip=clip, unit=clip)
        fewer = [[*records[:i], *records[i + 1 :]] for i in range(len(records))]
        sums = (_step(setting, job, mechanism, rest, clip=clip, unit=clip) for rest in fewer)
        return max(float(np.linalg.norm(whole - rest)) for rest in sums) / clip

    changes = {clip: over(max(clip, LEAST_CLIP)) for clip in clips}
    worst = max(changes, key=lambda clip: changes[clip])
    return _Change(over_clip=changes[worst], clip=worst, shortest=shortest, longest=longest, sides=job.trains)


def _step(
    setting: RecordLevelSetting, job: Job, mechanism: Mechanism, records: Sequence[Example], *, clip: float, unit: float
) -> Floats:
    """Return the sum of the gradients that one step over these records followed, over `unit`, times `unit`."""
    privacy = replace(setting.privacy, clip=clip, steps=1, rate=1.0)
    plain = Training(optimizer="sgd", lr=len(records) / unit, batch_size=setting.config.train.batch_size)
    with preflight.no_dropout(setting.model.net.train()):
        local_training.train_privately(
            setting.model, replace(job, privacy=privacy, training=plain), 0, [[e] for e in records], LoRA(), mechanism
        )
    after = setting.model.get_adapter()
    moved = {(s, m): job.start.side(s)[m].double() - t.double() for s in job.trains for m, t in after.side(s).items()}
    return as_vector(moved) * unit


def _everyone(_random: SecureRandom, n: int, _rate: float) -> list[int]:
    return list(range(n))


def _silently(total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor:
    return total.double()


def _accounted(setting: RecordLevelSetting, seen: Sequence[ObservedRound]) -> Finding:
    """T4: is the ledger's epsilon, after all rounds of one client, that of its steps?"""
    p = setting.privacy
    charge = Charge(noise=p.noise, rate=p.rate, steps=sum(len(s.drawn) for s in seen))
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
