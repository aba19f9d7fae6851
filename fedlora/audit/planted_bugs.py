"""Negative controls: bugs, published or easily made, each planted in one part of the product, and to be caught.

An audit that passes is worth what it would have caught. `fedlora audit --controls` plants them one after another, in a
copy of the part that is at fault, and shows which tests fail.
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
from .subject import RATE, Stage, Subject


@dataclass(frozen=True)
class PlantedBug:
    """A bug, and the test that must find it."""

    name: str
    caught_by: str  # how the test's name begins
    plant: Callable[[Any], Any]  # stage -> subject


def _no_clipping(_stage: Stage) -> Subject:
    def clip(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
        return [torch.ones(len(g)) for g in gradients]

    return Subject(replace(STANDARD, clip=clip))


def _noise_of_a_mean(stage: Stage) -> Subject:
    """The noise of a sum, taken down as if it were averaged over the batch."""
    root = sqrt(RATE * stage.records)

    def less(total: Tensor, deviation: float, numbers: SecureRandom) -> Tensor:
        return add_noise(total, deviation / root, numbers)

    return Subject(replace(STANDARD, add_noise=less))


def _a_side_without_noise(stage: Stage) -> Subject:
    """The first side that is trained, A where that is; only B gets noise, as it is the one that begins at zero."""
    job = stage.strategy.client_init(stage.strategy.init(stage.start), stage.client)
    bare = {t.shape for t in job.start.side(job.trains[0]).values()}

    def some(total: Tensor, deviation: float, numbers: SecureRandom) -> Tensor:
        return add_noise(total, 0.0 if total.shape in bare else deviation, numbers)

    return Subject(replace(STANDARD, add_noise=some))


def _clip_by_tensor(_stage: Stage) -> Subject:
    """Every tensor cut to C by itself, with noise for one C."""

    def each(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
        whole = bounds[0] if len(set(groups)) < 2 else hypot(*bounds)
        return clip(gradients, range(len(gradients)), [whole] * len(gradients))

    return Subject(replace(STANDARD, clip=each))


def _one_seed_for_all(_stage: Stage) -> Subject:
    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        return SecureRandom.seeded(derive(job.seed, "noise", job.round))

    return Subject(replace(STANDARD, source=source))


def _one_seed_for_all_rounds(_stage: Stage) -> Subject:
    def source(job: Job, client: int, privacy: PrivacyTerms) -> SecureRandom:
        return SecureRandom.seeded(derive(job.seed, "noise", client))

    return Subject(replace(STANDARD, source=source))


class _Forgetful(Ledger):
    """An accountant that is made anew every round."""

    def charges(self) -> list[Charge]:
        return super().charges()[-1:]


class _Forgets(JobRunner):
    @property
    def ledger(self) -> Ledger:
        return _Forgetful(self.folder, self.client_data.fingerprint)


def _accountant_made_anew(_stage: Stage) -> Subject:
    return Subject(runner=_Forgets)


def _batches_dealt_out(stage: Stage) -> Subject:
    """Batches of one size from a shuffled order, reckoned as if every record had been drawn by itself."""
    left: list[int] = []
    deck = np.random.default_rng(stage.seed)

    def deal(_numbers: SecureRandom, n: int, rate: float) -> list[int]:
        size = round(rate * n)
        if len(left) < size:
            left[:] = deck.permutation(n).tolist()
        batch, left[:] = left[:size], left[size:]
        return batch

    return Subject(replace(STANDARD, draw=deal))


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
    def __call__(self, job: Job, update: LoRA) -> None:
        clip, self.clip = self.clip, inf
        super().__call__(job, update)
        self.clip = clip


class _ClipsTensors(ClippedSum):
    """Every tensor cut to C by itself."""

    def __call__(self, job: Job, update: LoRA) -> None:
        for s, m, t in update.matrices():
            super().__call__(job, LoRA(**{s: {m: t}}))


class _NoiseOfAMean(ClientLevelDP):
    @property
    def sum_noise(self) -> float:
        return super().sum_noise / sqrt(self.rate * self.population)


class _SideWithoutNoise(ClientLevelDP):
    """A, or whatever is shared first, is the plain mean of the clipped updates."""

    def release(self, got: ClippedSum, start: LoRA, t: int, charges: tuple[Charge, ...]) -> NoisedUpdate:
        made, bare = super().release(got, start, t, charges), next(s for s in SIDES if start.side(s))
        expected = self.rate * self.population
        plain = {m: x.double() + got.total.get((bare, m), 0.0) / expected for m, x in start.side(bare).items()}
        return replace(made, update=LoRA(**{bare: plain}).over(made.update))


class _OneSeed(ClientLevelDP):
    def _source(self, purpose: str, t: int) -> SecureRandom:
        return SecureRandom.seeded(derive(0, purpose)) if purpose == "noise" else super()._source(purpose, t)


class _ChargesAnew(ClientLevelDP):
    def charge(self, before: Sequence[Charge]) -> tuple[Charge, ...]:
        return super().charge(())


class _CohortsOfOneSize(ClientLevelDP):
    def sample(self, clients: Sequence[Client], t: int) -> list[Client]:
        some = np.random.default_rng(t).permutation(len(clients))[: round(self.rate * self.population)]
        return [clients[i] for i in sorted(some.tolist())]


def _clips(kind: type[ClippedSum]) -> Callable[[Any], client_level.ClientLevelSubject]:
    return lambda _: client_level.ClientLevelSubject(clipping=kind)


def _hides(kind: type[ClientLevelDP]) -> Callable[[Any], client_level.ClientLevelSubject]:
    return lambda _: client_level.ClientLevelSubject(client_level=kind)


CLIENT = (
    PlantedBug("no clipping", "T1", _clips(_Unclipped)),
    PlantedBug("each tensor clipped by itself", "T1", _clips(_ClipsTensors)),
    PlantedBug("noise divided by the root of the cohort", "T2", _hides(_NoiseOfAMean)),
    PlantedBug("one side without noise", "T2", _hides(_SideWithoutNoise)),
    PlantedBug("one seed for the noise of all rounds", "T3 noise, two rounds", _hides(_OneSeed)),
    PlantedBug("accountant made anew every round", "T4", _hides(_ChargesAnew)),
    PlantedBug("cohorts of one size instead of drawn", "T5", _hides(_CohortsOfOneSize)),
)
