"""Tests of client-level privacy: the sensitivity of the sum to one client, the noise, the draws and the charges.

Rounds go through `fit`, with the run's strategy and its own client-level mechanism. The clients are made up, and send
what a test needs: updates of all lengths for the clip, and unchanged adapters for the noise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations_with_replacement
from math import inf, log, sqrt
from typing import Any

import numpy as np
import torch

from fedlora.config import Config
from fedlora.errors import Failure
from fedlora.jobs import HIGHEST_RANK, Charge, Client, Job, SecAggStep, Update, shared_start
from fedlora.lora import LoRA, difference, from_matrices, map_factors
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.privacy.client_level import ClientLevelDP, ClippedSum, client_level_dp
from fedlora.run.plan import Plan
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit
from fedlora.strategy import Strategy

from . import statistics
from .observer import as_vector
from .statistics import Counts, Finding, Floats
from .subject import model_and_strategy

ROUNDS = 4
DRAWS = 200  # of cohorts, each made again, and of the noise on a count
CLIENTS = 12  # with updates of lengths from a hundredth of the clip to a hundred times the clip
MANY = 300  # clients, each of which changes a number of its own by far more than the clip
FEW = 50  # clients, where the settings do not say how many there are


@dataclass(frozen=True)
class ClientLevelSubject:
    """The parts of the server that are audited: as they are, or with a bug planted in one, for the audit to find."""

    mechanism: type[ClientLevelDP] = ClientLevelDP
    clipped_sum: type[ClippedSum] = ClippedSum


@dataclass(frozen=True, eq=False)
class ClientLevelSetting:
    """Everything that is audited: a strategy, and the mechanism that hides its clients."""

    config: Config
    start: LoRA
    strategy: Strategy[Any]
    dp: ClientLevelDP
    seed: int = 0

    def mechanism(self, subject: ClientLevelSubject, **other: Any) -> ClientLevelDP:
        """Return the run's mechanism as an instance of the subject's class, with other values for these fields."""
        same = {f.name: getattr(self.dp, f.name) for f in fields(self.dp)}
        return subject.mechanism(**same | other)

    def described(self) -> dict[str, float]:
        """Return the numbers of the audit's own plan, for its findings."""
        return {"noise": self.dp.noise, "rate": self.dp.rate, "clients": self.dp.population}

    def job(self, state: Any) -> Job:
        """Return the job that a client of the highest rank is sent."""
        return self.strategy.client_init(state, HIGHEST_RANK)


@dataclass
class EchoClients:
    """Clients that send back the adapter that they were sent."""

    number: int
    rank: int
    traffic: PartTracker = field(default_factory=PartTracker)

    def clients(self) -> Sequence[Client]:
        """Return so many clients of one record each."""
        return [Client(id=i, examples=1, rank=self.rank, records=1) for i in range(self.number)]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Return the shared sides of the adapter of every job, as they came."""
        return ((i, Update(shared_start(job), 1, None)) for i, job in jobs.items())

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Answer no step of secure aggregation."""
        return {}

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """Evaluate nothing."""
        return {}


def client_level_setting(config: Config, seed: int = 0) -> ClientLevelSetting:
    """Return the subject of a client-level audit of these settings. Raises what a run of them would raise."""
    _, start, strategy = model_and_strategy(config)
    precise = map_factors(torch.Tensor.double, start)  # in which small noise shows
    clients = config.clients or FEW
    cohort = config.cohort or max(2, clients // 5)
    dp = client_level_dp(config.dp, cohort=cohort, clients=clients, rounds=config.rounds, seed=config.seed)
    return ClientLevelSetting(config, precise, strategy, dp, seed)


def sensitivity(setting: ClientLevelSetting, subject: ClientLevelSubject) -> Iterator[Finding]:
    """T1: without noise, how far does one client more or less move the sum over all sides, over the clip?"""
    state = setting.strategy.init(setting.start)
    job, C = setting.job(state), setting.dp.clip
    silent = setting.mechanism(subject, noise=0.0, rate=1.0, population=CLIENTS, quantile=0.0, seed=None, limit=inf)
    updates = [_stray(job, C * 10 ** float(x), i) for i, x in enumerate(np.linspace(-2, 2, CLIENTS))]
    start = shared_start(job)

    def total(updates: Sequence[LoRA]) -> tuple[Floats, float]:
        got = subject.clipped_sum(C)
        for update in updates:
            got.add(job, update)
        return CLIENTS * _difference(silent.release(got, start, 0, ()).update, start), got.below

    whole, count = total(updates)
    fewer = [total([*updates[:i], *updates[i + 1 :]]) for i in range(CLIENTS)]
    worst = max(float(np.linalg.norm(whole - rest)) / C for rest, _ in fewer)
    counted = max(abs(count - rest) for _, rest in fewer)
    yield Finding(
        name="T1 sensitivity",
        passed=worst <= 1.001 and counted <= 0.5,
        measured=worst,
        unit="C",
        allowed="at most 1.001, count 0.5",
        detail=f"most that one client moves the sum, over C = {C:g}; the count of those within C moves by {counted:g}",
    )
    yield _every_client(job, subject, C)


def noise(setting: ClientLevelSetting, subject: ClientLevelSubject) -> Iterator[Finding]:
    """T2, T3, T4: in rounds in which no client changes anything, are the noise and the charged epsilon right?"""
    mechanism, share = setting.mechanism(subject, limit=inf), setting.dp.share
    z = mechanism.noise / sqrt(1 - share) if mechanism.quantile else mechanism.noise
    seen = list(_rounds(setting, mechanism, ROUNDS))
    again = next(_rounds(setting, mechanism, 1))
    tensors: dict[str, Floats] = {}
    for t, heard in enumerate(seen):
        for (s, m), x in heard.noise.items():
            tensors[f"{s} of {m}, round {t + 1}"] = x
    yield from statistics.noise("noise", tensors, deviation=z)
    if mechanism.quantile:
        counts = {"the count": _counts(mechanism)}
        yield from statistics.noise("count", counts, deviation=mechanism.noise / (2 * sqrt(share)))
    yield from _compared(seen, again)
    charge = Charge(noise=mechanism.noise, rate=mechanism.rate, steps=len(seen))
    yield statistics.accounted(seen[-1].epsilon, setting.config.dp, charge, delta=mechanism.delta)


def draws(setting: ClientLevelSetting, subject: ClientLevelSubject) -> Iterator[Finding]:
    """T5: is every client drawn for a round by itself, and are the draws others when the run is done again?"""
    mechanism, clients = setting.mechanism(subject), EchoClients(setting.dp.population, 1).clients()
    once, again = (_drawn(mechanism, clients) for _ in range(2))
    yield from statistics.draws("cohort", [once, again], rate=mechanism.rate)
    yield statistics.drawn_otherwise("cohort", once, again, rate=mechanism.rate)


def _drawn(mechanism: ClientLevelDP, clients: Sequence[Client]) -> Counts:
    """Return how often each client is in each of `DRAWS` cohorts, (rounds, clients)."""
    cohorts = ([c.id for c in mechanism.sample(clients, t)] for t in range(DRAWS))
    return np.stack([np.bincount(np.array(ids, dtype=np.int64), minlength=len(clients)) for ids in cohorts])


def _every_client(job: Job, subject: ClientLevelSubject, C: float) -> Finding:
    """T1: of many clients, does any move the number that it alone changes by more than the clip?"""
    start = shared_start(job)
    count, got = min(MANY, start.numel()), subject.clipped_sum(C)
    for i in range(count):
        got.add(job, _loud(start, i, 100 * C))
    total = np.concatenate([got.total[s, m].flatten().numpy() for s, m, _ in start.matrices() if (s, m) in got.total])
    most = float(np.abs(total).max()) / C
    return Finding(
        name="T1 sensitivity, every place",
        passed=most <= 1.001,
        measured=most,
        unit="C",
        allowed="at most 1.001",
        detail=f"most that one of {count} clients moves the number that it alone changes, over C = {C:g}",
    )


def _loud(start: LoRA, place: int, size: float) -> LoRA:
    """Return the start with its number at this place moved by this much."""
    moved = {}
    for s, m, t in start.matrices():
        moved[s, m] = t.clone()
        if 0 <= place < t.numel():
            moved[s, m].view(-1)[place] += size
        place -= t.numel()
    return from_matrices((s, m, t) for (s, m), t in moved.items())


def _compared(seen: "Sequence[SilentRound]", again: "SilentRound") -> Iterator[Finding]:
    """T3: is the noise of any two rounds correlated, or that of a round with that of one which is done again?"""
    vectors = {f"round {t + 1}": x.vector for t, x in enumerate(seen)} | {"round 1, done again": again.vector}
    *rounds, repeated = vectors
    yield statistics.uncorrelated("two rounds", vectors, list(combinations_with_replacement(rounds, 2)))
    yield statistics.uncorrelated("done again", vectors, [(name, repeated) for name in rounds])


Test = Callable[[ClientLevelSetting, ClientLevelSubject], Iterator[Finding]]
TESTS: tuple[Test, ...] = (sensitivity, noise, draws)


@dataclass(frozen=True, eq=False)
class SilentRound:
    """A round in which no client changed anything, so that its update is noise alone."""

    noise: Mapping[tuple[str, str], Floats]  # (side, module) -> the noise on the sum, over the clip
    epsilon: float  # so far

    @property
    def vector(self) -> Floats:
        """All numbers of the noise as one vector."""
        return np.concatenate(list(self.noise.values()))


def _rounds(setting: ClientLevelSetting, mechanism: ClientLevelDP, rounds: int) -> Iterator[SilentRound]:
    """Yield rounds with clients that change nothing."""
    state = setting.strategy.init(setting.start)
    plan = Plan(rounds, cohort=2, seed=setting.config.seed, metrics=False, client_level=mechanism)
    for done in fit(setting.strategy, EchoClients(mechanism.population, setting.config.lora.rank), setting.start, plan):
        job, release = setting.job(state), done.client_level
        assert release is not None
        unit = mechanism.expected_cohort / release.clip
        noise = difference(release.update.only(job.shares), shared_start(job))
        yield SilentRound({(s, m): unit * t.flatten().numpy() for s, m, t in noise.matrices()}, release.epsilon)
        state = done.state


def _counts(mechanism: ClientLevelDP) -> Floats:
    """Return the noise on the count of `DRAWS` rounds, calculated back from the clips that follow from it."""
    start = LoRA({"m": torch.ones(1, 1)})
    clips = [mechanism.release(ClippedSum(mechanism.clip), start, t, ()).next_clip for t in range(DRAWS)]
    within = np.array([mechanism.quantile - log(c / mechanism.clip) / mechanism.lr for c in clips])
    return (within - 0.5) * mechanism.expected_cohort


def _stray(job: Job, length: float, seed: int) -> LoRA:
    """Return an update at this distance from the start over all shared numbers, in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    start = shared_start(job)
    size = sqrt(start.numel())

    def moved(t: torch.Tensor) -> torch.Tensor:
        return t + length / size * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    return map_factors(moved, start)


def _difference(x: LoRA, y: LoRA) -> Floats:
    return as_vector({(s, m): t for s, m, t in difference(x, y).matrices()})
