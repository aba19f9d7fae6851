"""Record-level privacy, tested: what one record can change, the noise on it, the draws, the ledger, and an attack.

Steinke, Nasr and Jagielski, Privacy Auditing with One (1) Training Run (NeurIPS 2023),
https://arxiv.org/abs/2305.08846, is the attack; the other tests are of the parts that a guarantee is made of, each of
which catches what an attack is too weak to see.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.client import training as worker
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
from .subject import ROUNDS, STEPS, Made, ObservedRound, Stage, Subject, flat, play

FREE, LEAST = 1e9, 1e-12  # clips: one that cuts nothing, and the least for gradients of zero
NULLS = 16  # records without a gradient, of a client whose noise is looked at
Look = Callable[[Stage, Subject], Iterator[Finding]]


def sensitivity(stage: Stage, subject: Subject) -> Iterator[Finding]:
    """T1: with the noise off, how far does one record more or less move the sum of a step, over the clip?

    Over all that is trained, sent or not, read off the model itself; for clips that cut all records, some and none.
    """
    silent = replace(subject.mechanism, draw=_everyone, add_noise=_silently)
    records = stage.made_up(0)
    tried = [(*_most(stage, job, silent, records), job.trains) for job in _jobs(stage)]
    worst, clip, lengths, sides = max(tried)
    allowed = preflight.OVER[stage.model.net.dtype.itemsize >= 4]
    detail = f"most that one record moves a sum, over C; at C = {clip:.2g}, with gradients of "
    detail += f"{lengths[0]:.2g} to {lengths[-1]:.2g}, over the sides {sides}"
    yield Finding("T1 sensitivity", worst <= allowed, worst, "C", f"at most {allowed:g}", detail)


def noise(stage: Stage, subject: Subject) -> Iterator[Finding]:
    """T2, T3: with no gradient at all, is what is left normal noise of the right size, and nobody else's?

    T2 holds it against N(0, sigma C) by Kolmogorov and Smirnov, tensor by tensor, and its size over all of it; T3 the
    noise of two clients against each other, that of two rounds, and that of a round that is done again from the start.
    """
    with TemporaryDirectory() as folder:
        empty = [Made(stage.model.encoder, (), examples=canaries.examples([False] * NULLS)) for _ in range(2)]
        seen = play(stage, subject, empty, Path(folder) / "once", rounds=2)
        again = play(stage, subject, empty, Path(folder) / "again", rounds=1)
    p = stage.privacy
    of = {f"{s} of {m}, client {x.client}, round {x.job.round + 1}": t for x in seen for (s, m), t in x.sums.items()}
    flattened = {name: t.flatten().numpy() for name, t in of.items()}
    yield from statistics.noise("noise", flattened, p.noise * p.clip * sqrt(STEPS))
    yield statistics.apart("two clients", seen[0].all, seen[1].all)
    yield statistics.apart("two rounds", seen[0].all, seen[2].all)
    yield statistics.apart("done again", seen[0].all, again[0].all)


def training(stage: Stage, subject: Subject) -> Iterator[Finding]:
    """T4, T5, T6: a whole plan of a client with canaries, and of one without, of which the server sees the uploads.

    Does the ledger say what another accountant makes of the steps that were seen? Are records drawn each by itself? And
    is there no epsilon that the client cannot have, as too many canaries were told from what it sent?
    """
    there = np.random.default_rng(stage.seed).random(stage.canaries) < 0.5
    nobody = [False] * stage.canaries
    kinds = (there.tolist(), nobody)
    clients_data = [
        Made(stage.model.encoder, (), examples=[*stage.made_up(i), *canaries.examples(kind)])
        for i, kind in enumerate(kinds)
    ]
    with TemporaryDirectory() as folder:
        seen = play(stage, subject, clients_data, Path(folder))
    p, own = stage.privacy, [s for s in seen if s.client == 0]
    charge = Charge(p.noise, p.rate, sum(len(s.drawn) for s in own))
    yield statistics.accounted(own[-1].epsilon, stage.config.dp, charge, p.delta)
    yield statistics.drawn("batch", np.concatenate([s.drawn for s in seen]), stage.records, p.rate)
    yield _attacked(stage, seen, there)


TESTS: tuple[Look, ...] = (sensitivity, noise, training)


def _jobs(stage: Stage) -> list[Job]:
    """A job of each set of sides that the strategy has trained in the first two rounds, with no factor at zero."""
    state, jobs = stage.strategy.init(stage.start), dict[str, Job]()
    for _ in range(2):
        job = select_rows(stage.strategy.client_init(state, stage.client))
        with seeded(7):
            jobs.setdefault(job.trains, replace(job, start=preflight.random_start(job.start)))
        state = stage.strategy.aggregate(state, [job.start.only(job.shares)], [1.0])
    return list(jobs.values())


def _most(stage: Stage, job: Job, mechanism: Mechanism, records: Sequence[Example]) -> tuple[float, float, list[float]]:
    """The most that leaving a record out moves the sum, over the clip; that clip; and the lengths of the gradients."""
    lengths = sorted(float(np.linalg.norm(_step(stage, job, mechanism, [e], FREE, 1.0))) for e in records)
    clips = [lengths[0] / 100, *(float(np.quantile(lengths, p)) for p in (0.25, 0.5, 0.75)), 100 * lengths[-1]]

    def moved(clip: float) -> float:
        whole = _step(stage, job, mechanism, records, clip, clip)
        rests = (_step(stage, job, mechanism, [e for e in records if e is not out], clip, clip) for out in records)
        return max(float(np.linalg.norm(whole - rest)) for rest in rests) / clip

    return (*max((moved(max(c, LEAST)), c) for c in clips), lengths)


def _step(stage: Stage, job: Job, mechanism: Mechanism, records: Sequence[Example], clip: float, unit: float) -> Floats:
    """What all that is trained moved by in one step over these records, in units."""
    privacy = replace(stage.privacy, clip=clip, steps=1, rate=1.0)
    plain = Training(optimizer="sgd", lr=len(records) / unit, batch_size=stage.config.train.batch_size)
    with preflight.no_dropout(stage.model.net.train()):
        worker.train_privately(
            stage.model, replace(job, privacy=privacy, training=plain), 0, [[e] for e in records], LoRA(), mechanism
        )
    after = stage.model.get_adapter()
    moved = {(s, m): job.start.side(s)[m].double() - t.double() for s in job.trains for m, t in after.side(s).items()}
    return flat(moved) * unit


def _everyone(_numbers: SecureRandom, n: int, _rate: float) -> list[int]:
    return list(range(n))


def _silently(total: Tensor, _deviation: float, _numbers: SecureRandom) -> Tensor:
    return total.double()


def _attacked(stage: Stage, seen: Sequence[ObservedRound], there: NDArray[np.bool_]) -> Finding:
    """T6: an epsilon that the client cannot have, as too many canaries were told from what it sent."""
    own, difference = np.zeros(len(there)), np.zeros(len(there))
    for t in range(ROUNDS):
        mine, other = (next(s for s in seen if s.client == i and s.job.round == t) for i in (0, 1))
        where = canaries.places(mine.job, stage.canaries, stage.seed)
        own += np.where(where >= 0, mine.sent[where], 0.0)
        difference += np.where(where >= 0, mine.sent[where] - other.sent[where], 0.0)
    said, delta = mine.epsilon, stage.privacy.delta
    bounds = [canaries.lower_bound(score, there, delta, attacks=2) for score in (own, difference)]
    detail = f"epsilon is at least this, by {len(there)} canaries: {bounds[0]:.2f} from the client's uploads, "
    detail += f"{bounds[1]:.2f} with the other client's taken off"
    return Finding("T6 canaries", max(bounds) <= said, max(bounds), "lower bound", f"at most {said:.2f}", detail)
