"""Client-level differential privacy (DP-FedAvg): every update is clipped as a whole, and their sum is noised.

McMahan et al., Learning Differentially Private Recurrent Language Models (ICLR 2018), https://arxiv.org/abs/1710.06963
Andrew et al., Differentially Private Learning with Adaptive Clipping (NeurIPS 2021), https://arxiv.org/abs/1905.03871

    each client is in a round with probability q, by itself;   D_k = what k sent - what it got, all sides as one
    x <- x + (sum_k D_k min(1, C / |D_k|) + N(0, z^2 C^2 I)) / (q n)

The divisor is q n and not the number of answers; a client that did not answer counts as zero. If a quantile is set, the
clip follows that quantile of the norms:

    C <- C exp(-lr (b - quantile)),   b = 1/2 + (sum_k ([|D_k| <= C] - 1/2) + N(0, s^2)) / (q n)

where 1/z^2 = 1/z_D^2 + 1/(2 s)^2 divides the noise between the sum and the count, whose sensitivities are C and 1/2.
One clip serves a whole round, for its clipping and for its noise.

That a client is in a round with probability q alone makes the release more private only towards those who do not know
whether it was. Under secure aggregation the members of a round know one another, so there every round counts as one
that the client was in (q = 1 in the accounting), and the promise is for its data: neighbours are federations in which
one client's vectors are zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client, Job, shared_start
from fedlora.lora import LoRA, difference, euclidean_norm, from_matrices
from fedlora.sections import PrivacyConfig
from fedlora.seeds import derive

from .accounting import calibrate, default_delta, epsilon, merge_charges
from .noise import SecureRandom


@dataclass(frozen=True, eq=False, kw_only=True)
class NoisedUpdate:
    """A round's noised update, and the privacy spent by the run up to it."""

    update: LoRA  # stands in for the mean of the clients' updates
    next_clip: float
    clip: float
    charges: tuple[Charge, ...]  # of all rounds so far
    epsilon: float
    noise_to_signal: float  # norm of the noise on the mean, over the clip: the largest norm that the mean can have

    def record(self) -> dict[str, Any]:
        """Return its part of the round's line in `rounds.jsonl`."""
        return {
            "epsilon": self.epsilon,
            "epsilon_median": self.epsilon,
            "clip": self.clip,
            "next_clip": self.next_clip,
            "noise_to_signal": self.noise_to_signal,
            "charges": [[c.noise, c.rate, c.steps] for c in self.charges],
        }


@dataclass
class ClippedSum:
    """The sum of one round's clipped updates."""

    clip: float
    total: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (side, module) -> sum in float64
    below: float = 0.0  # sum over clients of 1/2 where the norm was within the clip, and -1/2 where it was not

    def add(self, job: Job, update: LoRA) -> None:
        """Add one client's update, clipped; one that is not finite counts as zero."""
        delta = difference(update, shared_start(job))
        norm = euclidean_norm(delta)
        self.below += 0.5 if norm <= self.clip else -0.5
        if not isfinite(norm):
            return
        factor = min(1.0, self.clip / norm) if norm else 0.0
        for s, m, d in delta.matrices():
            self.total[s, m] = self.total.get((s, m), 0.0) + factor * d


@dataclass(frozen=True, kw_only=True)
class ClientLevelDP:
    """The client-level mechanism of a run."""

    noise: float  # z, of sum and count together
    rate: float  # q
    population: int  # n
    delta: float
    clip: float  # C, at first
    quantile: float = 0.0  # of the norms, which the clip follows; 0: the clip is fixed
    lr: float = 0.2  # of the clip
    share: float = 0.05  # of 1/z^2, for the count
    seed: int | None = None  # noise and cohorts are drawn from it: an experiment that is NOT PRIVATE
    limit: float = inf  # the largest epsilon that the run may spend
    amplified: bool = True  # is it secret who was drawn? If not, every round counts as one that the client was in

    def sample(self, clients: Sequence[Client], t: int) -> list[Client]:
        """Return the clients of round t. Only the server may know them, so the run's seed does not draw them."""
        ordered = sorted(clients, key=lambda c: c.id)
        return [ordered[i] for i in self._source("cohort", t).poisson_sample(len(ordered), self.rate)]

    def charge(self, before: Sequence[Charge]) -> tuple[Charge, ...]:
        """Return the charges with one more round.

        Where it is no secret who was drawn, the rounds before count as this one does: an older version charged them as
        amplified. Raises `PrivacyError`, before the round begins, where that round would spend more than the limit.
        """
        before = before if self.amplified else [replace(charge, rate=1.0) for charge in before]
        after = merge_charges([*before, self.charge_of(rounds=1)])
        there = epsilon(after, delta=self.delta)
        if there > self.limit * (1 + 1e-9):
            raise PrivacyError(
                f"one more round would bring epsilon from {epsilon(before, delta=self.delta):.3g} to {there:.3g}, and "
                f"{self.limit:.3g} is what dp.budget or dp.epsilon allows; the rounds before are kept"
            )
        return after

    def charge_of(self, *, rounds: int) -> Charge:
        """Return the charge of so many rounds."""
        return Charge(noise=self.noise, rate=self.rate if self.amplified else 1.0, steps=rounds)

    def release(self, got: ClippedSum, start: LoRA, t: int, charges: tuple[Charge, ...]) -> NoisedUpdate:
        """Return the start, moved by the noised sum of round t's updates over q n.

        A round without updates is released too, as noise alone.
        """
        source = self._source("noise", t)
        update = self._noised(got, start, source)  # before the clip: a seeded run draws its numbers in this order
        return NoisedUpdate(
            update=update,
            next_clip=self._next_clip(got, source) if self.quantile else got.clip,
            clip=got.clip,
            charges=charges,
            epsilon=epsilon(charges, delta=self.delta),
            noise_to_signal=self.noise_to_signal(start.numel()),
        )

    def noise_to_signal(self, numbers: int) -> float:
        """Return the norm of the noise on the mean of this many numbers, over the clip."""
        return sqrt(numbers) * self.sum_noise / self.expected_cohort

    @property
    def sum_noise(self) -> float:
        """z_D: the standard deviation of the noise on the sum, over the clip."""
        return self.noise / sqrt(1 - self.share) if self.quantile else self.noise

    @property
    def count_noise(self) -> float:
        """s: the standard deviation of the noise on the count."""
        return self.noise / (2 * sqrt(self.share))

    @property
    def expected_cohort(self) -> float:
        """q n: the expected number of clients in a round."""
        return self.rate * self.population

    def _noised(self, got: ClippedSum, start: LoRA, source: SecureRandom) -> LoRA:
        def moved(s: str, m: str, x: Tensor) -> Tensor:
            noisy = got.total.get((s, m), 0.0) + self.sum_noise * got.clip * source.normal(*x.shape)
            return (x.double() + noisy / self.expected_cohort).to(torch.promote_types(x.dtype, torch.float32))

        return from_matrices((s, m, moved(s, m, x)) for s, m, x in start.matrices())

    def _next_clip(self, got: ClippedSum, source: SecureRandom) -> float:
        b = 0.5 + (got.below + self.count_noise * float(source.normal(1))) / self.expected_cohort
        return got.clip * exp(-self.lr * (b - self.quantile))

    def _source(self, purpose: str, t: int) -> SecureRandom:
        if self.seed is None:
            return SecureRandom.secret()
        return SecureRandom.seeded(derive(self.seed, "central", purpose, t))


def client_level_dp(
    config: PrivacyConfig, *, cohort: int, clients: int, rounds: int, seed: int, secure: bool = False
) -> ClientLevelDP:
    """Return the client-level mechanism of a run that draws about `cohort` of its `clients` for each round.

    With `secure` aggregation the noise is for a client that is in every round, as members know who is in one. Raises
    `PrivacyError` for settings that would protect nobody.
    """
    if config.joins or config.ledger:
        raise PrivacyError("dp.joins and dp.ledger are each client's own; leave them out with dp.level = client")
    rate = cohort / clients
    delta = default_delta(config.delta, units=clients, who=f"{clients} clients")
    accounted = 1.0 if secure else rate
    noise = config.noise or calibrate(target=config.epsilon, delta=delta, rate=accounted, steps=rounds)
    return ClientLevelDP(
        noise=noise,
        rate=rate,
        population=clients,
        delta=delta,
        clip=config.clip,
        quantile=config.quantile,
        lr=config.quantile_lr,
        share=config.quantile_share,
        seed=seed if config.seeded else None,
        limit=config.limit,
        amplified=not secure,
    )
