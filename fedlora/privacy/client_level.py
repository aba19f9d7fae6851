"""Client-level privacy: the server bounds every client's whole update, and hides each in the noise on their sum.

McMahan et al., Learning Differentially Private Recurrent Language Models (ICLR 2018), https://arxiv.org/abs/1710.06963
Andrew et al., Differentially Private Learning with Adaptive Clipping (NeurIPS 2021), https://arxiv.org/abs/1905.03871

    each client is in a round with probability q, by itself;   D_k = what k sent less what it got, all sides as one
    x <- x + (sum_k D_k min(1, C / |D_k|) + N(0, z^2 C^2 I)) / (q n)

The divisor is q n and not how many came; who did not answer counts as zero. With a quantile the clip follows it:

    C <- C exp(-lr (b - quantile)),   b = 1/2 + (sum_k ([|D_k| <= C] - 1/2) + N(0, s^2)) / (q n)

where noise 1/z^2 = 1/z_D^2 + 1/(2 s)^2 is shared out between sum and count, whose sensitivities are C and 1/2. One clip
serves a round's clipping and its noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client, Job
from fedlora.lora import LoRA, difference, euclidean_norm, from_matrices
from fedlora.sections import PrivacyConfig
from fedlora.seeds import derive

from .accounting import calibrate, default_delta, epsilon, merge_charges
from .noise import SecureRandom


@dataclass(frozen=True, eq=False)
class NoisedUpdate:
    """What a round lets out of its clients' updates, and what that has cost so far."""

    update: LoRA  # in place of the mean of the clients'
    next_clip: float
    clip: float
    charges: tuple[Charge, ...]  # of all rounds so far
    epsilon: float
    noise_to_signal: float  # norm of the noise on the mean, over the clip: the most that a mean of updates can be long

    def record(self) -> dict[str, Any]:
        """For the round's line in `rounds.jsonl`."""
        seen = {"clip": self.clip, "next_clip": self.next_clip, "noise_to_signal": self.noise_to_signal}
        charges = [[c.noise, c.rate, c.steps] for c in self.charges]
        return {"epsilon": self.epsilon, "epsilon_median": self.epsilon, **seen, "charges": charges}


@dataclass
class ClippedSum:
    """One round's clipped updates, summed as they come."""

    clip: float
    total: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # (side, module) -> sum in float64
    below: float = 0.0  # sum over clients of 1/2 where its norm was within the clip, and -1/2 where it was not

    def __call__(self, job: Job, update: LoRA) -> None:
        """Take in one client's update; one that is not finite counts as zero."""
        delta = difference(update, job.start)
        norm = euclidean_norm(delta)
        self.below += 0.5 if norm <= self.clip else -0.5
        if isfinite(norm):
            c = min(1.0, self.clip / norm) if norm else 0.0
            for s, m, d in delta.matrices():
                self.total[s, m] = self.total.get((s, m), 0.0) + c * d


@dataclass(frozen=True)
class ClientLevelDP:
    """The mechanism of a run."""

    noise: float  # z, of sum and count together
    rate: float  # q
    population: int  # n
    delta: float
    clip: float  # C, at first
    quantile: float = 0.0  # 0: the clip stays
    lr: float = 0.2
    share: float = 0.05  # of 1/z^2, for the count
    seed: int | None = None  # noise and samples from it: an experiment that is NOT PRIVATE
    limit: float = inf  # of epsilon

    def sample(self, clients: Sequence[Client], t: int) -> list[Client]:
        """The clients of round t: nobody but the server may know them, so no seed of the run draws them."""
        ordered = sorted(clients, key=lambda c: c.id)
        return [ordered[i] for i in self._source("cohort", t).poisson_sample(len(ordered), self.rate)]

    def charge(self, before: Sequence[Charge]) -> tuple[Charge, ...]:
        """The charges with one more round. Raises `PrivacyError`, before anything is done, if that is too much."""
        after = merge_charges([*before, Charge(self.noise, self.rate, 1)])
        if (there := epsilon(after, self.delta)) > self.limit * (1 + 1e-9):
            raise PrivacyError(
                f"one more round would bring epsilon from {epsilon(before, self.delta):.3g} to {there:.3g}, and "
                f"{self.limit:.3g} is what dp.budget or dp.epsilon allows; the rounds before are kept"
            )
        return after

    def release(self, got: ClippedSum, start: LoRA, t: int, charges: tuple[Charge, ...]) -> NoisedUpdate:
        """The start moved by the noised sum of a round's updates over q n; for none of them by noise alone."""
        numbers, expected = self._source("noise", t), self.rate * self.population

        def moved(s: str, m: str, x: Tensor) -> Tensor:
            noisy = got.total.get((s, m), 0.0) + self.sum_noise * got.clip * numbers.normal(*x.shape)
            return (x.double() + noisy / expected).to(torch.promote_types(x.dtype, torch.float32))

        noised = from_matrices((s, m, moved(s, m, x)) for s, m, x in start.matrices())
        following = got.clip
        if self.quantile:
            within = 0.5 + (got.below + self.count_noise * float(numbers.normal(1))) / expected
            following = got.clip * exp(-self.lr * (within - self.quantile))
        spent, ratio = epsilon(charges, self.delta), self.noise_to_signal(start.numel())
        return NoisedUpdate(noised, following, got.clip, charges, spent, ratio)

    def noise_to_signal(self, numbers: int) -> float:
        """Norm of the noise on the mean of this many numbers, over the clip."""
        return sqrt(numbers) * self.sum_noise / (self.rate * self.population)

    @property
    def sum_noise(self) -> float:
        """z_D, over the clip."""
        return self.noise / sqrt(1 - self.share) if self.quantile else self.noise

    @property
    def count_noise(self) -> float:
        """s, the standard deviation of the noise on the count."""
        return self.noise / (2 * sqrt(self.share))

    def _source(self, purpose: str, t: int) -> SecureRandom:
        return (
            SecureRandom.secret()
            if self.seed is None
            else SecureRandom.seeded(derive(self.seed, "central", purpose, t))
        )


def client_level_dp(config: PrivacyConfig, cohort: int, clients: int, rounds: int, seed: int) -> ClientLevelDP:
    """The mechanism that hides clients. Raises `PrivacyError` for what would be no privacy."""
    if config.joins or config.ledger:
        raise PrivacyError("dp.joins and dp.ledger are each client's own; leave them out with dp.level = client")
    rate = cohort / clients
    delta = default_delta(config.delta, clients, f"{clients} clients")
    noise = config.noise or calibrate(config.epsilon, delta, rate, rounds)
    following = config.quantile, config.quantile_lr, config.quantile_share
    shown = seed if config.seeded else None
    return ClientLevelDP(noise, rate, clients, delta, config.clip, *following, shown, config.limit)
