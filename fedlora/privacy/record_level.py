"""What a run promises of its clients' privacy: its settings, each client's terms, and what is refused before it starts.

docs/privacy.md says what the promise is. It stands only where nothing else leaves a client than what the terms cover.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client, PrivacyTerms
from fedlora.sections import PrivacyConfig as PrivacyConfig
from fedlora.sections import Training

from .accounting import calibrate, default_delta, epsilon


@dataclass(frozen=True)
class RecordLevelDP:
    """DP-SGD for every client of a run."""

    config: PrivacyConfig  # with its delta
    training: Training
    rounds: int

    @property
    def max_participations(self) -> int:
        """The most rounds that a client may take part in; noise is for these, not for an average."""
        return min(self.config.joins or self.rounds, self.rounds)

    def of(self, client: Client, known: int = 0) -> PrivacyTerms:
        """One client's terms; `known`: its charges that the server has seen."""
        c, rate = self.config, self._rate(client)
        steps = self.training.steps or max(1, round(self.training.epochs / rate))
        noise = c.noise or calibrate(c.epsilon, c.delta, rate, steps * self.max_participations)
        return PrivacyTerms(noise, c.clip, c.head_share, rate, steps, c.delta, c.engine, c.seeded, known)

    def final_epsilon(self, client: Client) -> float:
        """Epsilon of a client that takes part as often as it may."""
        p = self.of(client)
        return epsilon([Charge(p.noise, p.rate, p.steps * self.max_participations)], p.delta)

    def _rate(self, client: Client) -> float:
        return self.config.rate or self.training.batch_size * self.training.accumulate / client.records


def record_level_dp(config: PrivacyConfig, training: Training, rounds: int, clients: Sequence[Client]) -> RecordLevelDP:
    """The terms of a run with these clients. Raises `PrivacyError` for what would be no privacy, naming the client."""
    smallest, largest = (of(clients, key=lambda c: c.records) for of in (min, max))
    n, batch = smallest.records, training.batch_size * training.accumulate
    who = f"client {smallest.id}, which has {n}"
    if n < 1:
        raise PrivacyError(f"client {smallest.id} has no records to train on; leave it out")
    if not config.rate and batch > n:
        raise PrivacyError(
            f"train.batch_size * train.accumulate = {batch} is more than the records of {who}; lower it, or set "
            "dp.rate, the share of its records that a client takes for a step"
        )
    if config.rate and config.rate * n < 1:
        raise PrivacyError(
            f"dp.rate = {config.rate:g} is less than one record a step for {who}; raise it to {1 / n:.2g} or more, or "
            "leave that client out"
        )
    delta = default_delta(config.delta, largest.records, f"client {largest.id}, which has {largest.records}")
    return RecordLevelDP(replace(config, delta=delta), training, rounds)
