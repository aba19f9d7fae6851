"""Which clients are in a round: those that can train, drawn by the run's seed and the round alone."""

import logging
from collections.abc import Mapping, Sequence
from random import Random

from fedlora.errors import PrivacyError, RoundFailed
from fedlora.jobs import Client
from fedlora.run.plan import Plan

log = logging.getLogger("fedlora")


class Cohort:
    """Draws the clients of a round; those that cannot train by the run's DP-SGD are left out, and named once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._left_out = set[int]()
        self._reasons: dict[Client, str] = {}  # why a client with these counts is left out; empty: it is not

    def eligible(self, clients: Sequence[Client]) -> list[Client]:
        """The clients that can train. Raises `PrivacyError` where none of them can."""
        dp = self._plan.record_level
        if not dp:
            return [*clients]
        for c in set(clients) - self._reasons.keys():
            self._reasons[c] = dp.why_left_out(c)
        if clients and all(self._reasons[c] for c in clients):
            raise PrivacyError(self._reasons[clients[0]])
        for c in clients:
            if self._reasons[c]:
                self.leave_out(c, self._reasons[c])
        return [c for c in clients if c.id not in self._left_out]

    def evaluated(self, clients: Sequence[Client], t: int) -> list[Client]:
        """The clients that are asked after round t how well their own models do: a sample, where there are many."""
        able, most = self.eligible(clients), self._plan.policy.eval_clients
        return sample(able, most, self._plan.seed, t, purpose="evaluation") if most else able

    def leave_out(self, client: Client, why: str) -> None:
        """Draw this client no more."""
        if client.id not in self._left_out:
            log.warning("client %d is left out: %s", client.id, why)
        self._left_out.add(client.id)

    def draw(self, clients: Sequence[Client], t: int, joined: Mapping[int, int]) -> list[Client]:
        """The clients of round t, without those that have joined as many rounds as their noise is computed for."""
        plan, able = self._plan, self.eligible(clients)
        if plan.client_level:
            return plan.client_level.sample(able, t)
        if plan.record_level:
            able = _with_budget(able, plan.record_level.max_participations, t, joined)
        return sample(able, plan.cohort, plan.seed, t)


def _with_budget(clients: Sequence[Client], most: int, t: int, joined: Mapping[int, int]) -> list[Client]:
    """The clients that have joined fewer rounds than the most that they may. Raises `RoundFailed` without one."""
    left = [c for c in clients if joined.get(c.id, 0) < most]
    if not left:
        raise RoundFailed(
            f"round {t + 1}: every client has joined dp.joins = {most} rounds, and has no budget for more; the rounds "
            "before are kept"
        )
    return left


def sample(clients: Sequence[Client], cohort: int, seed: int, t: int, purpose: str = "cohort") -> list[Client]:
    """The clients of round t, drawn without replacement by (seed, round) alone, in the order of their ids.

    Another `purpose` has a draw of its own.
    """
    ordered = sorted(clients, key=lambda c: c.id)
    chosen = Random(f"{seed}/{purpose}/{t}").sample(ordered, min(cohort, len(ordered)))
    return sorted(chosen, key=lambda c: c.id)
