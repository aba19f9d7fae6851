"""Record-level privacy of a run: the DP-SGD parameters of each client, and the refusal of settings that protect nobody.

docs/privacy.md says what is promised. The promise stands only where nothing else leaves a client than what these
parameters cover.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client, PrivacyTerms
from fedlora.sections import PrivacyConfig, Training

from .accounting import calibrate, default_delta, epsilon


@dataclass(frozen=True, kw_only=True)
class RecordLevelDP:
    """DP-SGD for every client of a run."""

    config: PrivacyConfig  # with its delta
    training: Training
    rounds: int

    @property
    def max_participations(self) -> int:
        """The largest number of rounds that a client may take part in; noise is for these, not for an average."""
        return min(self.config.joins or self.rounds, self.rounds)

    def terms_for(self, client: Client, *, known: int = 0) -> PrivacyTerms:
        """Return the parameters of one client; `known` is the number of its charges that the server has seen."""
        c, rate = self.config, self._rate(client)
        steps = self.training.steps or max(1, round(self.training.epochs / rate))
        noise = c.noise or calibrate(target=c.epsilon, delta=c.delta, rate=rate, steps=steps * self.max_participations)
        return PrivacyTerms(
            noise=noise,
            clip=c.clip,
            head_share=c.head_share,
            rate=rate,
            steps=steps,
            delta=c.delta,
            engine=c.engine,
            seeded=c.seeded,
            known=known,
        )

    def total(self, client: Client) -> Charge:
        """Return the charge of a client that takes part as often as it may."""
        p = self.terms_for(client)
        return Charge(noise=p.noise, rate=p.rate, steps=p.steps * self.max_participations)

    def final_epsilon(self, client: Client) -> float:
        """Return the epsilon of a client that takes part as often as it may."""
        return epsilon([self.total(client)], delta=self.config.delta)

    def _rate(self, client: Client) -> float:
        return self.config.rate or self.training.batch_size * self.training.accumulate / client.records


def record_level_dp(config: PrivacyConfig, training: Training, rounds: int, clients: Sequence[Client]) -> RecordLevelDP:
    """Return the DP-SGD of a run with these clients.

    Raises `PrivacyError`, naming the client, for settings that would protect nobody.
    """
    smallest = min(clients, key=lambda c: c.records)
    largest = max(clients, key=lambda c: c.records)
    _refuse_too_few_records(config, training, smallest)
    who = f"client {largest.id}, which has {largest.records}"
    delta = default_delta(config.delta, units=largest.records, who=who)
    return RecordLevelDP(config=replace(config, delta=delta), training=training, rounds=rounds)


def _refuse_too_few_records(config: PrivacyConfig, training: Training, client: Client) -> None:
    """Raise `PrivacyError` where the smallest client has too few records for one step."""
    n, batch = client.records, training.batch_size * training.accumulate
    who = f"client {client.id}, which has {n}"
    if n < 1:
        raise PrivacyError(f"client {client.id} has no records to train on; leave it out")
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
