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

    def eligible(self, clients: Sequence[Client]) -> list[Client]:
        """The clients that can train. Raises `PrivacyError` where none of them can."""
        dp = self._plan.record_level
        if not dp:
            return [*clients]
        reasons = {c: dp.why_left_out(c) for c in clients}
        if reasons and all(reasons.values()):
            raise PrivacyError(next(iter(reasons.values())))
        for c, why in reasons.items():
            if why:
                self.leave_out(c, why)
        return [c for c in clients if c.id not in self._left_out]

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


def sample(clients: Sequence[Client], cohort: int, seed: int, t: int) -> list[Client]:
    """The clients of round t, drawn without replacement by (seed, round) alone, in the order of their ids."""
    ordered = sorted(clients, key=lambda c: c.id)
    chosen = Random(f"{seed}/cohort/{t}").sample(ordered, min(cohort, len(ordered)))
    return sorted(chosen, key=lambda c: c.id)
