"""Planted bugs: published or easily made ones, each in one part of the product, which the audit must find.

An audit that passes is worth no more than the bugs it would have found. `fedlora audit --controls` plants them one by
one, each in a copy of the part at fault, and shows which tests fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import hypot, inf, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.client.ledger import Ledger
from fedlora.client.runner import JobRunner
from fedlora.jobs import Charge, Client, Job, PrivacyTerms
from fedlora.lora import SIDES, LoRA
from fedlora.privacy.client_level import ClientLevelDP, ClippedSum, NoisedUpdate
from fedlora.privacy.dpsgd import STANDARD, add_noise
from fedlora.privacy.noise import SecureRandom
from fedlora.privacy.per_sample_gradients import Gradients, clip
from fedlora.seeds import derive

from . import client_level
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


class _Forgetful(Ledger):
    """A ledger that knows its last charge alone, as an accountant that is made anew every round does."""

    def charges(self) -> list[Charge]:
        return super().charges()[-1:]


class _Forgets(JobRunner):
    """A job runner with such a ledger."""

    @property
    def ledger(self) -> Ledger:
        """The ledger that forgets."""
        return _Forgetful(self.folder, self.client_data.fingerprint)


def _accountant_made_anew(_setting: RecordLevelSetting) -> RecordLevelSubject:
    return RecordLevelSubject(runner=_Forgets)


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


RECORD = (
    PlantedBug("no clipping", "T1", _no_clipping),
    PlantedBug("noise divided by the root of the batch", "T2", _noise_of_a_mean),
    PlantedBug("one side without noise", "T2", _a_side_without_noise),
    PlantedBug("each tensor clipped by itself", "T1", _clip_by_tensor),
    PlantedBug("one seed for the noise of all clients", "T3 noise, two clients", _one_seed_for_all),
    PlantedBug("one seed for the noise of all rounds", "T3 noise, two rounds", _one_seed_for_all_rounds),
    PlantedBug("accountant made anew every round", "T4", _accountant_made_anew),
    PlantedBug("batches dealt out instead of drawn", "T5", _batches_dealt_out),
)


class _Unclipped(ClippedSum):
    """No update is clipped."""

    def add(self, job: Job, update: LoRA) -> None:
        clip, self.clip = self.clip, inf
        super().add(job, update)
        self.clip = clip


class _ClipsTensors(ClippedSum):
    """Every tensor is clipped to C by itself."""

    def add(self, job: Job, update: LoRA) -> None:
        for s, m, t in update.matrices():
            super().add(job, LoRA(**{s: {m: t}}))


class _NoiseOfAMean(ClientLevelDP):
    """The noise of a sum, reduced as if it were averaged over the cohort."""

    @property
    def sum_noise(self) -> float:
        return super().sum_noise / sqrt(self.expected_cohort)


class _SideWithoutNoise(ClientLevelDP):
    """A, or the first shared side, is the plain mean of the clipped updates."""

    def release(self, got: ClippedSum, start: LoRA, t: int, charges: tuple[Charge, ...]) -> NoisedUpdate:
        made = super().release(got, start, t, charges)
        bare = next(s for s in SIDES if start.side(s))
        plain = {
            m: x.double() + got.total.get((bare, m), 0.0) / self.expected_cohort for m, x in start.side(bare).items()
        }
        return replace(made, update=LoRA(**{bare: plain}).over(made.update))


class _OneSeed(ClientLevelDP):
    """The noise of every round comes from the same seed."""

    def _source(self, purpose: str, t: int) -> SecureRandom:
        return SecureRandom.seeded(derive(0, purpose)) if purpose == "noise" else super()._source(purpose, t)


class _ChargesAnew(ClientLevelDP):
    """Every round is charged as if it were the first."""

    def charge(self, before: Sequence[Charge]) -> tuple[Charge, ...]:
        return super().charge(())


class _CohortsOfOneSize(ClientLevelDP):
    """Cohorts of one size from a shuffled order, accounted for as if every client had been drawn by itself."""

    def sample(self, clients: Sequence[Client], t: int) -> list[Client]:
        chosen = np.random.default_rng(t).permutation(len(clients))[: round(self.expected_cohort)]
        return [clients[i] for i in sorted(chosen.tolist())]


def _clips(kind: type[ClippedSum]) -> Callable[[Any], client_level.ClientLevelSubject]:
    return lambda _: client_level.ClientLevelSubject(clipped_sum=kind)


def _hides(kind: type[ClientLevelDP]) -> Callable[[Any], client_level.ClientLevelSubject]:
    return lambda _: client_level.ClientLevelSubject(mechanism=kind)


CLIENT = (
    PlantedBug("no clipping", "T1", _clips(_Unclipped)),
    PlantedBug("each tensor clipped by itself", "T1", _clips(_ClipsTensors)),
    PlantedBug("noise divided by the root of the cohort", "T2", _hides(_NoiseOfAMean)),
    PlantedBug("one side without noise", "T2", _hides(_SideWithoutNoise)),
    PlantedBug("one seed for the noise of all rounds", "T3 noise, two rounds", _hides(_OneSeed)),
    PlantedBug("accountant made anew every round", "T4", _hides(_ChargesAnew)),
    PlantedBug("cohorts of one size instead of drawn", "T5", _hides(_CohortsOfOneSize)),
)
