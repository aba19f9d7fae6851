"""The rules of a fleet, and how long it waits for answers by them.

Where `server.deadline` says no time, the answers that came say it: once a quorum is in, the others have ten times as
long as the median answer took, and ten minutes at least. A minority of clients, quick or slow, cannot move a median.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from statistics import median
from typing import Any

from fedlora.messages.agreement import RunAgreement
from fedlora.sections import Policy

LONGEST = 43_200.0  # seconds that an unanswered message is waited for where nothing says less; Flower keeps it as long
FOREVER = 1e9  # seconds: what Flower is told of a message that never expires
SHORTEST = 600.0  # seconds that clients have at least, where the answers before say how long they have
TIMES = 10.0  # how many times as long as the median answer took
KEPT = 1000  # answers whose times are remembered


@dataclass(frozen=True)
class FleetRules:
    """The rules by which a fleet admits clients and waits for them."""

    clients: int  # how many the run is to have
    quorum: float = 1.0  # share of them without which it does not begin
    wait: float = 0.0  # seconds for those beyond the quorum
    deadline: float = 0.0  # seconds after which a round's missing clients have failed; 0: by the answers before
    grace: float = inf  # seconds that the others have once `enough` have answered
    enough: float = 1.0  # share of a round's clients whose answers are a quorum
    needed: float = 0.0  # share of a round's clients without which those that are away are waited for
    largest_step: float = inf  # norm of an update above which it is refused
    run: str = ""  # name of the run, by which clients keep their state
    nodes: Mapping[int, int] | None = None  # node -> the client whose key the node has; None: nodes are believed
    ranks: Sequence[int] = ()  # of each client; none: clients are believed
    agreement: RunAgreement = field(default_factory=RunAgreement)  # what clients are told that they will be asked for
    base: str = ""  # fingerprint of the base model that all must have; none: not compared
    tells_all: bool = False  # a simulation: clients on this machine may tell more than a code of what went wrong
    patient: bool = False  # wait for clients that cannot say who they are until they can; else give up

    @property
    def longest(self) -> float:
        """Seconds after which a message is not waited for any more, whoever has answered."""
        return self.deadline or LONGEST


def rules_of(policy: Policy, clients: int, *, threshold: float = 0.0, **more: Any) -> FleetRules:
    """The rules of a run by its settings; `threshold` is the share that secure aggregation needs, if it is on."""
    return FleetRules(
        clients=clients,
        deadline=policy.deadline,
        grace=policy.grace,
        enough=max(policy.quorum, threshold),
        needed=policy.quorum if policy.below_quorum == "stop" else 0.0,
        largest_step=policy.largest_step,
        **more,
    )


class AnswerTimes:
    """How long the latest answers took, of one kind of message, over all rounds."""

    def __init__(self) -> None:
        self._seconds = deque[float](maxlen=KEPT)

    def add(self, seconds: float) -> None:
        """Remember how long an answer took."""
        self._seconds.append(seconds)

    def patience(self) -> float:
        """Seconds that a client may take, by those that answered; inf before there was an answer."""
        return max(SHORTEST, TIMES * median(self._seconds)) if self._seconds else inf


class AnswerClock:
    """How long clients that were sent one kind of message may still take."""

    def __init__(
        self,
        rules: FleetRules,
        times: AnswerTimes,
        asked: int,
        answered: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`asked` clients make the round, and `answered` of them have answered already; `now` tells the time."""
        self._rules, self._times, self._now = rules, times, now
        self._short = max(1, ceil(rules.enough * asked)) - answered  # answers that a quorum lacks
        self._began, self._enough_since = now(), inf
        self._look_for_quorum()

    @property
    def longest(self) -> float:
        """Seconds since the messages were sent after which none is waited for, whoever has answered."""
        return self._rules.longest

    @property
    def waited(self) -> float:
        """Seconds since the messages were sent."""
        return self._now() - self._began

    def answered(self) -> None:
        """Take note of a client's answer that was found good."""
        self._times.add(self.waited)
        self._short -= 1
        self._look_for_quorum()

    def limit(self) -> float:
        """Seconds since the messages were sent after which nobody is waited for, by what is known now."""
        rules, waits = self._rules, self._short > 0 and self._rules.needed > 0
        if waits:
            return rules.longest  # without a quorum there is no round, so that waiting loses nothing
        by_answers = inf if rules.deadline else self._times.patience()
        return min(rules.longest, by_answers, self._enough_since + rules.grace)

    def is_over(self) -> bool:
        """Is nobody waited for any more?"""
        return self.waited > self.limit()

    def _look_for_quorum(self) -> None:
        if self._short <= 0:
            self._enough_since = min(self._enough_since, self.waited)
