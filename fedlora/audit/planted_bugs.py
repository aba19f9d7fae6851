"""Planted bugs: published or easily made ones, each in one part of the product, which the audit must find.

An audit that passes is worth no more than the bugs it would have found. `fedlora audit --controls` plants them one by
one, each in a copy of the part at fault, and shows which tests fail.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import hypot, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.client import handlers
from fedlora.client.ledger import Ledger
from fedlora.client.runner import JobRunner
from fedlora.jobs import Charge, Job, PrivacyTerms, Update
from fedlora.privacy.dpsgd import STANDARD, add_noise
from fedlora.privacy.noise import SecureRandom
from fedlora.privacy.per_sample_gradients import Gradients, clip
from fedlora.seeds import derive

from .subject import RATE, RecordLevelSetting, RecordLevelSubject


@dataclass(frozen=True)
class PlantedBug:
    """A bug, and the test that must find it."""

    name: str
    caught_by: str  # how the test's name begins
    plant: Callable[[Any], Any]  # the audit's setting -> its subject with the bug

    def is_caught(self, failed: Sequence[str]) -> bool:
        """Is the test that must find this bug among those that failed?"""
        return any(name.startswith(self.caught_by) for name in failed)


def _no_clipping(_setting: RecordLevelSetting) -> RecordLevelSubject:
    def clip(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
        return [torch.ones(len(g)) for g in gradients]

    return RecordLevelSubject(replace(STANDARD, clip=clip))


def _noise_of_a_mean(setting: RecordLevelSetting) -> RecordLevelSubject:
    """The noise of a sum, reduced as if it were averaged over the batch."""
    root = sqrt(RATE * setting.records)

    def less(total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor:
        return add_noise(total, deviation=deviation / root, random=random)

    return RecordLevelSubject(replace(STANDARD, add_noise=less))


def _a_side_without_noise(setting: RecordLevelSetting) -> RecordLevelSubject:
    """The first trained side, A if it is trained, gets no noise."""
    job = setting.strategy.client_init(setting.strategy.init(setting.start), setting.client)
    bare = {t.shape for t in job.start.side(job.trains[0]).values()}

    def unless_bare(total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor:
        return add_noise(total, deviation=0.0 if total.shape in bare else deviation, random=random)

    return RecordLevelSubject(replace(STANDARD, add_noise=unless_bare))


def _clip_by_tensor(_setting: RecordLevelSetting) -> RecordLevelSubject:
    """Every tensor is clipped to C by itself, with noise for one C."""

    def by_tensor(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
        whole = bounds[0] if len(set(groups)) < 2 else hypot(*bounds)
        return clip(gradients, range(len(gradients)), [whole] * len(gradients))

    return RecordLevelSubject(replace(STANDARD, clip=by_tensor))


def _one_seed_for_all(_setting: RecordLevelSetting) -> RecordLevelSubject:
    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        return SecureRandom.seeded(derive(job.seed, "noise", job.round))

    return RecordLevelSubject(replace(STANDARD, source=source))


def _one_seed_for_all_rounds(_setting: RecordLevelSetting) -> RecordLevelSubject:
    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        return SecureRandom.seeded(derive(job.seed, "noise", client))

    return RecordLevelSubject(replace(STANDARD, source=source))


def _runner_with(kind: type[Ledger]) -> type[JobRunner]:
    """Return a job runner whose ledger is of this kind."""

    class WithOtherLedger(JobRunner):
        @property
        def ledger(self) -> Ledger:
            return kind(self.folder, self.client_data)

    return WithOtherLedger


class _Forgetful(Ledger):
    """A ledger that knows its last charge alone, as an accountant that is made anew every round does."""

    def charges(self) -> list[Charge]:
        return super().charges()[-1:]


def _accountant_made_anew(_setting: RecordLevelSetting) -> RecordLevelSubject:
    return RecordLevelSubject(runner=_runner_with(_Forgetful))


def _batches_dealt_out(setting: RecordLevelSetting) -> RecordLevelSubject:
    """Batches of one size from a shuffled order, accounted for as if every record had been drawn by itself."""
    left: list[int] = []
    deck = np.random.default_rng(setting.seed)

    def deal(_random: SecureRandom, n: int, rate: float) -> list[int]:
        size = round(rate * n)
        if len(left) < size:
            left[:] = deck.permutation(n).tolist()
        batch, left[:] = left[:size], left[size:]
        return batch

    return RecordLevelSubject(replace(STANDARD, draw=deal))


def _noise_again_two_rounds_later(_setting: RecordLevelSetting) -> RecordLevelSubject:
    """A client's round t + 2 has the random numbers of its round t."""
    keys: dict[tuple[int, int], bytes] = {}

    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        keys[client, job.round] = keys.get((client, job.round - 2), os.urandom(32))
        return SecureRandom(keys[client, job.round])

    return RecordLevelSubject(replace(STANDARD, source=source))


def _one_sample_a_round(_setting: RecordLevelSetting) -> RecordLevelSubject:
    """The records of a round's first step are those of all its steps, accounted for as if drawn anew in each."""
    sample: list[int] = []

    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        sample.clear()
        return SecureRandom.secret()

    def draw(random: SecureRandom, n: int, rate: float) -> list[int]:
        sample[:] = sample or random.poisson_sample(n, rate)
        return list(sample)

    return RecordLevelSubject(replace(STANDARD, source=source, draw=draw))


def _one_record_in_every_step(_setting: RecordLevelSetting) -> RecordLevelSubject:
    def draw(random: SecureRandom, n: int, rate: float) -> list[int]:
        return sorted({0, *random.poisson_sample(n, rate)})

    return RecordLevelSubject(replace(STANDARD, draw=draw))


class _AnswersNothingAgain(Ledger):
    """A ledger that knows what is paid for, and stores no answer."""

    def answer(self, job: str) -> Update | None:
        return None

    def _already_paid(self, entries: Sequence[Mapping[str, Any]], job: str) -> bool:
        return any(e["job"] == job for e in entries)


def _a_job_sent_again_is_trained_again(_setting: RecordLevelSetting) -> RecordLevelSubject:
    return RecordLevelSubject(runner=_runner_with(_AnswersNothingAgain))


def _all_noise_in_the_last_step(setting: RecordLevelSetting) -> RecordLevelSubject:
    """The sum of a round's steps has all its noise, and every step but the last has none."""
    calls: Counter[str] = Counter()
    trained: list[int] = []

    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        calls.clear()
        trained[:] = [sum(len(job.start.side(s)) for s in job.trains)]
        return SecureRandom.secret()

    def late(total: Tensor, *, deviation: float, random: SecureRandom) -> Tensor:
        step = calls["noise"] // trained[0]
        calls["noise"] += 1
        last = step == setting.privacy.steps - 1
        return add_noise(total, deviation=last * sqrt(setting.privacy.steps) * deviation, random=random)

    return RecordLevelSubject(replace(STANDARD, source=source, add_noise=late))


class _OneDropout(SecureRandom):
    """Secret noise and samples, and one seed for the dropout of all."""

    def key(self) -> bytes:
        return bytes(32)


def _dropout_seeded_for_all(_setting: RecordLevelSetting) -> RecordLevelSubject:
    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        return _OneDropout(os.urandom(32))

    return RecordLevelSubject(replace(STANDARD, source=source))


def _last_of_a_large_batch_not_clipped(_setting: RecordLevelSetting) -> RecordLevelSubject:
    """The last record of a micro-batch of more than nine is not clipped."""

    def but_the_last(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
        factors = [factor.clone() for factor in clip(gradients, groups, bounds)]
        for factor in factors:
            factor[9:][-1:] = 1.0
        return factors

    return RecordLevelSubject(replace(STANDARD, clip=but_the_last))


def _large_batches_clipped_by_their_mean(_setting: RecordLevelSetting) -> RecordLevelSubject:
    """A micro-batch of more than nine records is clipped as one: its mean is C long at most."""

    def by_mean(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
        n = len(gradients[0])
        if n <= 9:
            return clip(gradients, groups, bounds)
        factors = clip([g.mean(0, keepdim=True) for g in gradients], groups, bounds)
        return [factor.expand(n) for factor in factors]

    return RecordLevelSubject(replace(STANDARD, clip=by_mean))


class _HalfTheRate(Ledger):
    """A ledger that charges every job at half its sampling rate."""

    def charge(self, job: str, privacy: PrivacyTerms, **others: Any) -> None:
        super().charge(job, replace(privacy, rate=privacy.rate / 2), **others)


def _charged_at_half_the_rate(_setting: RecordLevelSetting) -> RecordLevelSubject:
    return RecordLevelSubject(runner=_runner_with(_HalfTheRate))


class _TellsScores(JobRunner):
    """A job runner that evaluates for whoever asks."""

    def __init__(self, *given: Any, **named: Any) -> None:
        """Let scores out, whatever the client's settings say."""
        super().__init__(*given, **named)
        object.__setattr__(self, "policy", replace(self.policy, metrics=True))


def _scores_told(_setting: RecordLevelSetting) -> RecordLevelSubject:
    return RecordLevelSubject(runner=_TellsScores)


def _sentences_sent(_setting: RecordLevelSetting) -> RecordLevelSubject:
    """What went wrong leaves the client as a sentence, with whatever it names."""
    return RecordLevelSubject(handle=partial(handlers.handle, tells_all=True))


class _ForgetsFailures(Ledger):
    """A ledger in which a job that failed stands as one that never ended."""

    def fail(self, job: str) -> None:
        """Write nothing."""


def _a_failed_job_is_trained_again(_setting: RecordLevelSetting) -> RecordLevelSubject:
    return RecordLevelSubject(runner=_runner_with(_ForgetsFailures))


RECORD = (
    PlantedBug("no clipping", "T1", _no_clipping),
    PlantedBug("noise divided by the root of the batch", "T2", _noise_of_a_mean),
    PlantedBug("one side without noise", "T2", _a_side_without_noise),
    PlantedBug("each tensor clipped by itself", "T1", _clip_by_tensor),
    PlantedBug("one seed for the noise of all clients", "T3 noise, two clients", _one_seed_for_all),
    PlantedBug("one seed for the noise of all rounds", "T3 noise, two rounds", _one_seed_for_all_rounds),
    PlantedBug("accountant made anew every round", "T4", _accountant_made_anew),
    PlantedBug("batches dealt out instead of drawn", "T5", _batches_dealt_out),
    PlantedBug("noise of a round used again two rounds later", "T3 noise, two rounds", _noise_again_two_rounds_later),
    PlantedBug("one sample for all steps of a round", "T5 batch, steps apart", _one_sample_a_round),
    PlantedBug("one record in every step", "T5 batch, how often each", _one_record_in_every_step),
    PlantedBug("a job sent again is trained again", "T7", _a_job_sent_again_is_trained_again),
    PlantedBug("all noise in the last step of a round", "T2 noise, every step", _all_noise_in_the_last_step),
    PlantedBug("dropout seeded for all", "T8", _dropout_seeded_for_all),
    PlantedBug("last of more than nine not clipped", "T1", _last_of_a_large_batch_not_clipped),
    PlantedBug("more than nine clipped by their mean", "T1", _large_batches_clipped_by_their_mean),
    PlantedBug("charged at half the rate", "T4", _charged_at_half_the_rate),
    PlantedBug("scores told to whoever asks", "T9 evaluation", _scores_told),
    PlantedBug("a failure's sentence sent", "T9 reasons", _sentences_sent),
    PlantedBug("a failed job trained again", "T9 failed twice", _a_failed_job_is_trained_again),
)
