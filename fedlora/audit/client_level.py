"""Client-level privacy, tested: what one client can change of the sum, the noise on it, the draws and the charges.

Rounds go through `rounds.fit`, with the run's strategy and its own `Central`; the clients are made up, and send what a
test needs of them: updates of all lengths to the clip, and nothing new to see the noise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf, log, sqrt
from typing import Any

import numpy as np
import torch

from fedlora.config import Config
from fedlora.errors import Failure
from fedlora.jobs import Charge, Client, Job, SecAggStep, Update
from fedlora.lora import LoRA, map_factors
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.privacy.client_level import ClientLevelDP, ClippedSum, client_level_dp
from fedlora.run.plan import Plan
from fedlora.server.aggregation import Answers
from fedlora.server.rounds import fit
from fedlora.strategy import HIGHEST_RANK, Strategy

from . import statistics
from .statistics import Finding, Floats
from .subject import flat, worn

ROUNDS = 3
DRAWS = 400  # of cohorts, and of the noise on a count
CLIENTS = 12  # whose updates are clipped, of lengths from a hundredth of the clip to a hundred times it
FEW = 50  # clients, where nothing says how many there are


@dataclass(frozen=True)
class ClientLevelSubject:
    """The product as it is; or with a bug in one of its parts, which the audit must find."""

    client_level: type[ClientLevelDP] = ClientLevelDP
    clipping: type[ClippedSum] = ClippedSum


@dataclass(frozen=True, eq=False)
class Crowd:
    """A strategy, and the mechanism that hides its clients."""

    config: Config
    start: LoRA
    strategy: Strategy[Any]
    client_level: ClientLevelDP
    seed: int = 0

    def mechanism(self, subject: ClientLevelSubject, **other: Any) -> ClientLevelDP:
        """The run's, in the subject's class, with some of it changed."""
        same = {f.name: getattr(self.client_level, f.name) for f in fields(self.client_level)}
        return subject.client_level(**same | other)

    def job(self, state: Any) -> Job:
        """What clients of the highest rank would be sent."""
        return self.strategy.client_init(state, HIGHEST_RANK)


@dataclass
class Silent:
    """Clients who send back what they were sent."""

    number: int
    rank: int
    traffic: PartTracker = field(default_factory=PartTracker)

    def clients(self) -> Sequence[Client]:
        return [Client(i, 1, self.rank, 1) for i in range(self.number)]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        return ((i, Update(job.start.only(job.shares), 1, None)) for i, job in jobs.items())

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        return {}

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return {}


def build(config: Config, seed: int = 0) -> Crowd:
    """Everything that an audit of these settings needs. Raises what a run of them would raise."""
    _, start, strategy = worn(config)
    wide = map_factors(torch.Tensor.double, start)  # where small noise shows
    clients = config.clients or FEW
    made = client_level_dp(config.dp, config.cohort or max(2, clients // 5), clients, config.rounds, config.seed)
    return Crowd(config, wide, strategy, made, seed)


def sensitivity(crowd: Crowd, subject: ClientLevelSubject) -> Iterator[Finding]:
    """T1: with the noise off, how far does one client more or less move the sum over all sides, over the clip?"""
    state = crowd.strategy.init(crowd.start)
    job, C = crowd.job(state), crowd.client_level.clip
    numb = crowd.mechanism(subject, noise=0.0, rate=1.0, population=CLIENTS, quantile=0.0, seed=None, limit=inf)
    steps = [_stray(job, C * 10 ** float(x), i) for i, x in enumerate(np.linspace(-2, 2, CLIENTS))]

    def total(who: Sequence[int]) -> tuple[Floats, float]:
        got = subject.clipping(C)
        for i in who:
            got(job, steps[i])
        start = job.start.only(job.shares)
        return CLIENTS * _difference(numb.release(got, start, 0, ()).update, start), got.below

    whole, count = total(range(CLIENTS))
    rests = [total([j for j in range(CLIENTS) if j != i]) for i in range(CLIENTS)]
    worst = max(float(np.linalg.norm(whole - rest)) / C for rest, _ in rests)
    counted = max(abs(count - fewer) for _, fewer in rests)
    detail = f"most that one client moves the sum, over C = {C:g}; the count of those within C moves by {counted:g}"
    good, allowed = worst <= 1.001 and counted <= 0.5, "at most 1.001, count 0.5"
    yield Finding("T1 sensitivity", good, worst, "C", allowed, detail)


def noise(crowd: Crowd, subject: ClientLevelSubject) -> Iterator[Finding]:
    """T2, T3, T4: of rounds in which no client changes a thing, the noise, and what they cost."""
    mechanism, share = crowd.mechanism(subject, limit=inf), crowd.client_level.share
    z = mechanism.noise / sqrt(1 - share) if mechanism.quantile else mechanism.noise
    seen = list(_rounds(crowd, mechanism, ROUNDS))
    again = next(_rounds(crowd, mechanism, 1))
    tensors = {f"{s} of {m}, round {t + 1}": x for t, one in enumerate(seen) for (s, m), x in one.noise.items()}
    yield from statistics.noise("noise", tensors, z)
    if mechanism.quantile:
        counts = {"the count": _counts(mechanism)}
        yield from statistics.noise("count", counts, mechanism.noise / (2 * sqrt(share)))
    yield statistics.apart("two rounds", seen[0].all, seen[1].all)
    yield statistics.apart("done again", seen[0].all, again.all)
    charge = Charge(mechanism.noise, mechanism.rate, len(seen))
    yield statistics.accounted(seen[-1].epsilon, crowd.config.dp, charge, mechanism.delta)


def draws(crowd: Crowd, subject: ClientLevelSubject) -> Iterator[Finding]:
    """T5: is every client in a round by itself?"""
    mechanism, clients = crowd.mechanism(subject), Silent(crowd.client_level.population, 1).clients()
    sizes = np.array([float(len(mechanism.sample(clients, t))) for t in range(DRAWS)])
    yield statistics.drawn("cohort", sizes, mechanism.population, mechanism.rate)


Look = Callable[[Crowd, ClientLevelSubject], Iterator[Finding]]
TESTS: tuple[Look, ...] = (sensitivity, noise, draws)


@dataclass(frozen=True, eq=False)
class Heard:
    """A round in which no client changed a thing."""

    noise: Mapping[tuple[str, str], Floats]  # (side, module) -> the noise on the sum, over the clip
    epsilon: float  # so far

    @property
    def all(self) -> Floats:
        return np.concatenate(list(self.noise.values()))


def _rounds(crowd: Crowd, mechanism: ClientLevelDP, rounds: int) -> Iterator[Heard]:
    state = crowd.strategy.init(crowd.start)
    plan = Plan(rounds, cohort=2, seed=crowd.config.seed, metrics=False, client_level=mechanism)
    for done in fit(crowd.strategy, Silent(mechanism.population, crowd.config.lora.rank), crowd.start, plan):
        job, release = crowd.job(state), done.client_level
        assert release is not None
        unit = mechanism.rate * mechanism.population / release.clip
        pairs = ((s, m, t, release.update.side(s)[m]) for s in job.shares for m, t in job.start.side(s).items())
        yield Heard({(s, m): unit * (x - t).flatten().numpy() for s, m, t, x in pairs}, release.epsilon)
        state = done.state


def _counts(mechanism: ClientLevelDP) -> Floats:
    """The noise on the count, taken back out of the clips that follow from it."""
    one = LoRA({"m": torch.ones(1, 1)})
    clips = [mechanism.release(ClippedSum(mechanism.clip), one, t, ()).next_clip for t in range(DRAWS)]
    within = np.array([mechanism.quantile - log(c / mechanism.clip) / mechanism.lr for c in clips])
    return (within - 0.5) * mechanism.rate * mechanism.population


def _stray(job: Job, length: float, seed: int) -> LoRA:
    """An update that is this far from the start over all that is shared, in a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    start = job.start.only(job.shares)
    size = sqrt(start.numel())

    def moved(t: torch.Tensor) -> torch.Tensor:
        return t + length / size * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    return map_factors(moved, start)


def _difference(x: LoRA, y: LoRA) -> Floats:
    return flat({(s, m): x.side(s)[m] - t for s, m, t in y.matrices()})
