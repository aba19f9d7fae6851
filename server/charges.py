"""What the clients of a private run have been charged with by a round, whatever became of their answers.

A client charges its ledger before it trains. So one whose update was refused, came too late or never came is charged
too, and counts as having taken part; of those that tell no epsilon the server knows its own run's share of it.
"""

from collections.abc import Sequence
from math import isfinite

from fedlora.errors import Failure, ReasonCode
from fedlora.jobs import Client, PrivacySpent
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.run.plan import ResumePoint
from fedlora.server.aggregation import Collected

BEFORE_CHARGE = frozenset(  # reasons of a client that has not charged its ledger
    (ReasonCode.POLICY, ReasonCode.PRIVACY, ReasonCode.BUDGET, ReasonCode.LEDGER, ReasonCode.MESSAGE)
)
NOTHING = PrivacySpent(epsilon=0.0, charges=0)


def after_round(
    dp: RecordLevelDP | None, past: ResumePoint, clients: Sequence[Client], got: Collected
) -> dict[int, PrivacySpent]:
    """What each of the round's clients has spent after it, without those that were not charged in it."""
    if not dp:
        return {}
    charged = [c for c in clients if _was_charged(got.failed.get(c.id))]
    return {c.id: _spent(dp, past, c, got.spent.get(c.id)) for c in charged}


def _was_charged(failure: Failure | None) -> bool:
    """May this client have been charged? Not where it was sent no job, or says that it refused before the charge."""
    return failure is None or (failure.sent and failure.code not in BEFORE_CHARGE)


def _spent(dp: RecordLevelDP, past: ResumePoint, client: Client, told: PrivacySpent | None) -> PrivacySpent:
    """What a client tells, which cannot be less than it told before; else what this run has asked of it.

    The count of charges is only ever what the client told: a job names it, and a client whose ledger has fewer has
    lost some.
    """
    before = past.spent.get(client.id, NOTHING)
    if told and isfinite(told.epsilon) and told.charges:
        return PrivacySpent(epsilon=max(told.epsilon, before.epsilon), charges=told.charges)
    asked = dp.epsilon_after(client, rounds=past.joined.get(client.id, 0) + 1)
    return PrivacySpent(epsilon=max(asked, before.epsilon), charges=before.charges)
