"""Record-level privacy of a run: the DP-SGD parameters of each client, and the refusal of settings that protect nobody.

docs/privacy.md says what is promised. The promise stands only where nothing else leaves a client than what these
parameters cover. They follow from what a client says of itself, so that a client which says what cannot be has only its
own parameters from it, or none: it is left out by name, and the run goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.errors import PrivacyError
from fedlora.jobs import Charge, Client, PrivacyTerms
from fedlora.sections import PrivacyConfig, Training

from .accounting import calibrate, default_delta, epsilon, refuse_charge

LEAST_CLIP, MOST_CLIP = 1e-20, 1e20  # among the smallest numbers of float32, sums of clipped gradients pass the clip
LARGEST_DELTA = 1e-5  # of a client, where none is set
MOST_STEPS = 10**5  # of a client in a round: more cannot be trained, nor accounted in reasonable time


@dataclass(frozen=True, kw_only=True)
class RecordLevelDP:
    """DP-SGD for every client of a run."""

    config: PrivacyConfig
    training: Training
    rounds: int

    @property
    def max_participations(self) -> int:
        """The largest number of rounds that a client may take part in; noise is for these, not for an average."""
        return min(self.config.joins or self.rounds, self.rounds)

    @property
    def delta(self) -> float:
        """The largest delta of any client: a smaller one promises more."""
        return self.config.delta or LARGEST_DELTA

    def delta_for(self, client: Client) -> float:
        """Return the delta of one client: the one that is set, or a tenth of one over its own records if that is less.

        No client's count of records has a say in another's delta.
        Raises `PrivacyError` for a delta that is set and allows one of its records to be given away whole.
        """
        who = f"client {client.id}, which has {client.records}"
        return default_delta(self.config.delta, units=client.records, who=who)

    def terms_for(self, client: Client, *, known: int = 0) -> PrivacyTerms:
        """Return the parameters of one client; `known` is the number of its charges that the server has seen."""
        c, rate, steps, delta = self.config, self._rate(client), self._steps(client), self.delta_for(client)
        noise = c.noise or calibrate(target=c.epsilon, delta=delta, rate=rate, steps=steps * self.max_participations)
        return PrivacyTerms(
            noise=noise,
            clip=c.clip,
            head_share=c.head_share,
            rate=rate,
            steps=steps,
            delta=delta,
            engine=c.engine,
            seeded=c.seeded,
            known=known,
        )

    def why_left_out(self, client: Client) -> str:
        """Return why this client cannot train by the run's DP-SGD; empty where it can, as far as counts say."""
        return self._why_too_few(client) or self._why_too_many(client) or self._why_no_delta(client)

    def charge(self, client: Client, *, rounds: int) -> Charge:
        """Return the charge of a client that took part in so many rounds."""
        p = self.terms_for(client)
        return Charge(noise=p.noise, rate=p.rate, steps=p.steps * rounds)

    def total(self, client: Client) -> Charge:
        """Return the charge of a client that takes part as often as it may."""
        return self.charge(client, rounds=self.max_participations)

    def final_epsilon(self, client: Client) -> float:
        """Return the epsilon of a client that takes part as often as it may."""
        return epsilon([self.total(client)], delta=self.delta_for(client))

    def epsilon_after(self, client: Client, *, rounds: int) -> float:
        """Return the epsilon of a client that took part in so many rounds of this run, and in no other run."""
        return epsilon([self.charge(client, rounds=rounds)], delta=self.delta_for(client))

    def epsilon_with(self, client: Client, charges: Sequence[Charge], *, rounds: int) -> float:
        """Return the epsilon of a client whose ledger holds these charges, after so many rounds more."""
        p = self.terms_for(client)
        more = [Charge(noise=p.noise, rate=p.rate, steps=p.steps * rounds)] if rounds else []
        return epsilon([*charges, *more], delta=self.delta_for(client))

    def _rate(self, client: Client) -> float:
        return self.config.rate or self.training.batch_size * self.training.accumulate / client.records

    def _steps(self, client: Client) -> int:
        return self.training.steps or max(1, round(self.training.epochs / self._rate(client)))

    def _why_too_few(self, client: Client) -> str:
        """Why a client has too few records for one step."""
        n, batch, rate = client.records, self.training.batch_size * self.training.accumulate, self.config.rate
        who = f"client {client.id}, which has {n}"
        if n < 1:
            return f"client {client.id} has no records to train on; leave it out"
        if not rate and batch > n:
            return (
                f"train.batch_size * train.accumulate = {batch} is more than the records of {who}; lower it, or set "
                "dp.rate, the share of its records that a client takes for a step"
            )
        if rate and rate * n < 1:
            return (
                f"dp.rate = {rate:g} is less than one record a step for {who}; raise it to {1 / n:.2g} or more, or "
                "leave that client out"
            )
        return ""

    def _why_too_many(self, client: Client) -> str:
        """Why a client has more records than can be gone through in a round."""
        steps = self._steps(client)
        if steps <= MOST_STEPS:
            return ""
        return (
            f"client {client.id} says it has {client.records} records, {steps} steps a round; {MOST_STEPS} are the "
            "most: set train.steps"
        )

    def _why_no_delta(self, client: Client) -> str:
        """Why the delta that is set protects nobody of a client."""
        try:
            self.delta_for(client)
        except PrivacyError as e:
            return str(e)
        return ""


def record_level_dp(config: PrivacyConfig, training: Training, rounds: int, clients: Sequence[Client]) -> RecordLevelDP:
    """Return the DP-SGD of a run with these clients.

    Raises `PrivacyError`, naming a client, for settings by which none of them can train.
    """
    dp = RecordLevelDP(config=config, training=training, rounds=rounds)
    reasons = [dp.why_left_out(client) for client in clients]
    if all(reasons):
        raise PrivacyError(reasons[0] if reasons else "there is no client to train")
    return dp


def refuse_terms(terms: PrivacyTerms) -> None:
    """Raise `PrivacyError` for terms that no DP-SGD has, whoever they come from."""
    refuse_charge(Charge(noise=terms.noise, rate=terms.rate, steps=terms.steps))
    if not LEAST_CLIP <= terms.clip <= MOST_CLIP:
        raise PrivacyError(f"clip = {terms.clip}, and a clip lies between {LEAST_CLIP:g} and {MOST_CLIP:g}")
    for name in ("delta", "head_share"):
        value = getattr(terms, name)
        if not 0 < value < 1:
            raise PrivacyError(f"{name} = {value}, and it lies between 0 and 1")
