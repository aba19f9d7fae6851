"""Planted bugs of client-level privacy, in the clipped sum or in the mechanism: see `fedlora.audit.planted_bugs`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from math import inf, sqrt
from typing import Any

import numpy as np

from fedlora.jobs import Charge, Client, Job
from fedlora.lora import SIDES, LoRA
from fedlora.privacy.client_level import ClientLevelDP, ClippedSum, NoisedUpdate
from fedlora.privacy.noise import SecureRandom
from fedlora.seeds import derive

from . import client_level
from .planted_bugs import PlantedBug


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


class _PublicCohorts(ClientLevelDP):
    """Cohorts are drawn from a seed that every client knows."""

    def sample(self, clients: Sequence[Client], t: int) -> list[Client]:
        public = SecureRandom.seeded(derive(0, "cohort", t))
        return [clients[i] for i in public.poisson_sample(len(clients), self.rate)]


class _NoiseTwoRoundsLater(ClientLevelDP):
    """The noise of round t is that of round t + 2 too."""

    def _source(self, purpose: str, t: int) -> SecureRandom:
        if purpose != "noise":
            return super()._source(purpose, t)
        key = sha256(f"{id(self)} {t % 2}".encode()).digest()
        return SecureRandom(key)


class _UnclippedFromThe13th(ClippedSum):
    """The first twelve updates are clipped, and no other."""

    def add(self, job: Job, update: LoRA) -> None:
        self.added = getattr(self, "added", 0) + 1
        clip, self.clip = self.clip, self.clip if self.added <= 12 else inf
        super().add(job, update)
        self.clip = clip


class _OneClientInEveryCohort(ClientLevelDP):
    """The first client is in every round, accounted for as if it had been drawn."""

    def sample(self, clients: Sequence[Client], t: int) -> list[Client]:
        return [clients[0], *super().sample(clients[1:], t)]


class _HalfTheRateCharged(ClientLevelDP):
    """Every round is charged at half its sampling rate."""

    def charge_of(self, *, rounds: int) -> Charge:
        return replace(super().charge_of(rounds=rounds), rate=self.rate / 2)


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
    PlantedBug("cohorts drawn from the run's public seed", "T5 cohort, done again", _hides(_PublicCohorts)),
    PlantedBug("noise of a round used again two rounds later", "T3 noise, two rounds", _hides(_NoiseTwoRoundsLater)),
    PlantedBug("updates from the 13th on not clipped", "T1", _clips(_UnclippedFromThe13th)),
    PlantedBug("one client in every round", "T5 cohort, how often each", _hides(_OneClientInEveryCohort)),
    PlantedBug("charged at half the rate", "T4", _hides(_HalfTheRateCharged)),
)
