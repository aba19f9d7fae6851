"""What a run is to do, and what came of a round: values, whatever the strategy and the fleet."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from fedlora.errors import Failure
from fedlora.jobs import Charge, PrivacySpent
from fedlora.lora import LoRA
from fedlora.metrics import Metrics
from fedlora.privacy.client_level import ClientLevelDP, NoisedUpdate
from fedlora.privacy.record_level import RecordLevelDP
from fedlora.sections import MessageConfig, SecureConfig, Training
from fedlora.sections import Policy as Policy


@dataclass(frozen=True, eq=False)
class ResumePoint:
    """Where a resumed run takes up."""

    rounds: int  # finished
    state: Any
    losses: tuple[float, ...] = ()  # of the global model, one an evaluation
    spent: Mapping[int, PrivacySpent] = field(default_factory=dict)  # client -> what its ledger said last
    joined: Mapping[int, int] = field(default_factory=dict)  # client -> rounds that it was in, of a private run
    clip: float | None = None  # of clients' updates, where the run hides clients
    charges: tuple[Charge, ...] = ()  # for that, of all rounds
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last held-out scores

    def with_spent(self, spent: Mapping[int, PrivacySpent]) -> "ResumePoint":
        """The same after these clients' ledgers were charged for a round."""
        joined = Counter(self.joined)
        joined.update(spent.keys())
        return replace(self, spent={**self.spent, **spent}, joined=joined)


@dataclass(frozen=True, eq=False)
class RoundResult:
    """What came of a round."""

    number: int  # from 1
    state: Any
    asked: tuple[int, ...]
    failed: Mapping[int, Failure]
    train_loss: float | None  # mean over clients by weight; none where the round was skipped
    eval: Mapping[str, float] | None  # of the global model
    eval_clients: Mapping[str, float | int | str] | None  # of each client's model on its own held-out examples
    bytes_up: int
    bytes_down: int
    seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)  # the strategy's own figures
    exactness: float | None = None  # relative distance from the mean of the clients' models; none: not measured
    spent: Mapping[int, PrivacySpent] = field(default_factory=dict)  # of every client that ever told, after this round
    client_level: NoisedUpdate | None = None  # where the run hides clients
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last, for who needs senders
    skipped: bool = False  # too few clients answered, and the state is as it was

    def record(self) -> dict[str, Any]:
        """The round's line in `rounds.jsonl`."""
        notes = {"notes": dict(self.notes)} if self.notes else {}
        measured = {"exactness": self.exactness} if self.exactness is not None else {}
        return {
            "round": self.number,
            "clients": len(self.asked),
            "answered": len(self.asked) - len(self.failed),
            "failed": {str(i): failure.reason for i, failure in self.failed.items()},
            "train_loss": self.train_loss,
            "eval": self.eval,
            "eval_clients": self.eval_clients,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": round(self.seconds, 3),
            **notes,
            **measured,
            **self._privacy(),
        }

    def _privacy(self) -> dict[str, Any]:
        if self.client_level:
            return self.client_level.record()
        if not self.spent:
            return {}
        epsilons = [s.epsilon for s in self.spent.values()]
        of_this_round = {str(i): [s.epsilon, s.charges] for i, s in self.spent.items() if i in self.asked}
        return {"epsilon": max(epsilons), "epsilon_median": median(epsilons), "spent": of_this_round}


@dataclass(frozen=True)
class Plan:
    """What `fit` is to do, whatever the strategy and the fleet."""

    rounds: int
    cohort: int  # clients asked in a round
    seed: int = 0
    training: Training = field(default_factory=Training)
    policy: Policy = field(default_factory=Policy)
    evaluate: Callable[[LoRA], Metrics] | None = None  # the global model on the global held-out set
    evaluate_clients: bool = False
    exactness: Mapping[str, float] | None = None  # module -> s, to measure it; all of a round's updates are then held
    metrics: bool = True  # may clients tell their training loss?
    record_level: RecordLevelDP | None = None  # clients hide their records by DP-SGD
    client_level: ClientLevelDP | None = None  # the server hides clients
    secure: SecureConfig | None = None  # it sees sums alone
    messages: MessageConfig = field(default_factory=MessageConfig)
