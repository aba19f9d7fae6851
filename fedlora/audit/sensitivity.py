"""T1 of record-level privacy: without noise, how far does one record more or less move the sum of a step?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fedlora.client import training
from fedlora.client.stacked import together
from fedlora.client.training import Outcome, TrainingTask
from fedlora.encoding.encoder import Example
from fedlora.jobs import Job, shared_start
from fedlora.lora import LoRA
from fedlora.messages.sketch import select_rows
from fedlora.privacy import preflight
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.privacy.noise import SecureRandom
from fedlora.sections import Training
from fedlora.seeds import seeded
from fedlora.strategy import Sender, next_state

from . import canaries
from .observer import as_vector, moved
from .statistics import Finding, Floats
from .subject import RecordLevelSetting, RecordLevelSubject

NO_CLIP = 1e9  # a clip that cuts nothing
LEAST_CLIP = 1e-12  # for gradients of zero
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the gradients' norms, at which the clip is set in turn
MEDIAN = (0.5,)
MICRO = 3  # records of a micro-batch, of which there are then several
COMPANY = 8  # times another client's records in one pass
MANY = 20  # micro-batches of canaries


def sensitivity(setting: RecordLevelSetting, subject: RecordLevelSubject) -> Iterator[Finding]:
    """T1: without noise, how far does one record more or less move the sum of a step, over the clip?

    The sum is over all trained parameters, sent or not, and is read off the model itself. The clips that are tried cut
    all records, some of them, and none. Once more it is tried with micro-batches of `MICRO` records, of which the last
    has fewer; and with many canaries, each of which leaves its part of the sum at a place of its own.
    """
    silent = replace(subject.mechanism, draw=_everyone, add_noise=_silently)
    records, size = setting.made_up[0], setting.config.train.batch_size
    allowed, jobs = preflight.OVER[setting.model.net.dtype.itemsize >= 4], jobs_to_try(setting)
    for name, batch_size, quantiles in (("", size, QUANTILES), (", micro-batches", MICRO, MEDIAN)):
        tried = [
            _largest_change(setting, job, silent, records, quantiles=quantiles, batch_size=batch_size) for job in jobs
        ]
        yield _bounded(name, tried, allowed)
    yield _every_record(setting, jobs, silent)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """The largest change of a step's sum by one record."""

    over_clip: float
    clip: float
    shortest: float  # norms of the gradients of single records
    longest: float
    sides: str


def jobs_to_try(setting: RecordLevelSetting) -> list[Job]:
    """Return a job for every set of sides that the strategy trains in a step of the first two rounds.

    Its first step is one that trains them, and no factor is at zero.
    """
    state, jobs = setting.strategy.init(setting.start), dict[str, Job]()
    for _ in range(2):
        job = select_rows(setting.strategy.client_init(state, setting.client))
        with seeded(7):
            start = preflight.random_start(job.start)
        for step in range(max(1, len(job.turns))):
            turned = replace(job, start=start, turns=job.turns[step:] + job.turns[:step])
            jobs.setdefault(turned.sides_of(0), turned)
        senders = [Sender(setting.client.id, 1)]
        state = next_state(setting.strategy, state, [shared_start(job)], [1.0], senders)
    return list(jobs.values())


def _bounded(which: str, tried: Sequence[_Change], allowed: float) -> Finding:
    """T1: is the largest of these changes within the clip?"""
    worst = max(tried, key=lambda change: change.over_clip)
    return Finding(
        name=f"T1 sensitivity{which}",
        passed=worst.over_clip <= allowed,
        measured=worst.over_clip,
        unit="C",
        allowed=f"at most {allowed:g}",
        detail=f"most that one record moves a sum, over C; at C = {worst.clip:.2g}, with gradients of "
        f"{worst.shortest:.2g} to {worst.longest:.2g}, over the sides {worst.sides}",
    )


def _largest_change(
    setting: RecordLevelSetting,
    job: Job,
    mechanism: Mechanism,
    records: Sequence[Example],
    *,
    quantiles: Sequence[float],
    batch_size: int,
) -> _Change:
    """Return the largest change of the sum when one record is left out, at these quantiles of the gradients' norms.

    The quantile 0 stands for a clip far below all norms, and 1 for one far above.
    """

    def step(those: Sequence[Example], clip: float, unit: float) -> Floats:
        """Of all clients of the step, end to end: no other client's sum may change either."""
        return np.concatenate(_step(setting, job, mechanism, those, clip=clip, unit=unit, batch_size=batch_size))

    alone = [_step(setting, job, mechanism, [e], clip=NO_CLIP, unit=1.0, batch_size=batch_size)[0] for e in records]
    norms = [float(np.linalg.norm(own)) for own in alone]

    def over(clip: float) -> float:
        whole = step(records, clip, clip)
        fewer = [[*records[:i], *records[i + 1 :]] for i in range(len(records))]
        return max(float(np.linalg.norm(whole - step(rest, clip, clip))) for rest in fewer) / clip

    clips = [max(_clip_at(q, norms), LEAST_CLIP) for q in quantiles]
    changes = {clip: over(clip) for clip in clips}
    worst = max(changes, key=lambda clip: changes[clip])
    return _Change(over_clip=changes[worst], clip=worst, shortest=min(norms), longest=max(norms), sides=job.sides_of(0))


def _clip_at(quantile: float, norms: Sequence[float]) -> float:
    far = {0.0: min(norms) / 100, 1.0: 100 * max(norms)}
    return far.get(quantile, float(np.quantile(norms, quantile)))


def _every_record(setting: RecordLevelSetting, jobs: Sequence[Job], mechanism: Mechanism) -> Finding:
    """T1: of many canaries, in batches of several sizes, does any move its own number by more than the clip?"""
    cut = set[int]() if setting.stacked else {MICRO, setting.config.train.batch_size}  # a pass is cut by its lengths
    most, sizes = 0.0, sorted(cut | {setting.canaries})
    for job in jobs:
        for size in sizes:
            count = min(setting.canaries, MANY * size)
            where = canaries.places(job, count, setting.seed)
            everyone = canaries.examples([True] * count)
            rows = canaries.rows(mechanism, _one_step(setting, job, 1.0), where, [everyone])
            known = replace(mechanism, engine=canaries.engine(mechanism, job, where), rows=rows)
            parts = _step(setting, job, known, everyone, clip=1.0, unit=1.0, batch_size=size)[0]
            most = max(most, float(np.abs(parts).max()))
    return Finding(
        name="T1 sensitivity, every place",
        passed=most <= 1.001,
        measured=most,
        unit="C",
        allowed="at most 1.001",
        detail=f"most that one of up to {setting.canaries} canaries moves its own number, over C, in micro-batches of "
        f"{', '.join(map(str, sizes))}",
    )


def _step(
    setting: RecordLevelSetting,
    job: Job,
    mechanism: Mechanism,
    records: Sequence[Example],
    *,
    clip: float,
    unit: float,
    batch_size: int,
) -> list[Floats]:
    """Return the sums of the gradients that one step of each client followed, over `unit`, times `unit`.

    The first client has these records. Where clients train in one pass there is another in it, for micro-batches of
    `MICRO` with so many records of its own that the pass is cut into several.
    """
    tasks, seen = [], list[Callable[[], LoRA]]()
    others = [setting.made_up[1] * (COMPANY if batch_size == MICRO else 1)] if setting.stacked else []
    for client, own in enumerate([records, *others]):
        plain = Training(optimizer="sgd", lr=len(own) / unit, batch_size=batch_size)
        wanted = replace(_one_step(setting, job, clip), training=plain)
        own_mechanism = mechanism if client == 0 else replace(mechanism, rows=STANDARD.rows)  # it has no canaries
        watched = replace(own_mechanism, watch=seen.append)
        tasks.append(
            TrainingTask(client=client, job=wanted, kept=LoRA(), records=[[e] for e in own], mechanism=watched)
        )
    with preflight.no_dropout(setting.model.net.train()):
        for outcome in _trained(setting, tasks):
            if isinstance(outcome, Exception):
                raise outcome
    return [-as_vector(dict(moved(read(), job.start, job.trains))) * unit for read in seen]


def _trained(setting: RecordLevelSetting, tasks: Sequence[TrainingTask]) -> Iterator[Outcome]:
    """Yield what came of each task by the engine of the run."""
    if setting.stacked:
        yield from (outcome for _, outcome in together.perform(setting.model, tasks, warn=lambda _: None))
    else:
        yield from (training.outcome_of(setting.model, task) for task in tasks)


def _one_step(setting: RecordLevelSetting, job: Job, clip: float) -> Job:
    return replace(job, privacy=replace(setting.privacy, clip=clip, steps=1, rate=1.0))


def _everyone(_random: SecureRandom, n: int, _rate: float) -> list[int]:
    return list(range(n))


def _silently(total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor:
    return total.double()
