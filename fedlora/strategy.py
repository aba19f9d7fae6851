"""What a federated algorithm is: pure functions on the server, and the two messages that reach the clients.

A strategy never runs on a client: all that a client must do is data in a `Job`, all that it did is data in an `Update`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor

from .lora import LoRA
from .options import Encoding
from .options import Training as Training

if TYPE_CHECKING:
    from .compress import Packed


@dataclass(frozen=True)
class Client:
    """What the server knows of a client."""

    id: int
    examples: int
    rank: int
    records: int = 0  # what a private run protects and draws: rows or examples; 0: not counted


@dataclass(frozen=True)
class Privacy:
    """What makes a client's work in a round differentially private: the terms of its DP-SGD (docs/privacy.md)."""

    noise: float  # sigma: the noise's standard deviation over the clip
    clip: float  # C: the largest norm of one record's gradient over all that is trained
    head_share: float  # of C^2, for the head, where it is trained beside factors: C_A^2 + C_H^2 = C^2
    rate: float  # q: the probability that a record is in a step, each by itself
    steps: int  # in a round
    delta: float
    engine: str = "auto"  # of the gradients of single examples
    seeded: bool = False  # noise and samples from the run's seed: an experiment, and NOT PRIVATE
    known: int = 0  # charges in this client's ledger that the server has seen: one with fewer has lost some


@dataclass(frozen=True)
class Ask:
    """Server to client: a step of secure aggregation (see `secure`)."""

    step: Literal["join", "share", "reveal"]
    context: str  # the round, with a word that makes every attempt at it another
    roster: Mapping[int, tuple[str, str, str]] = field(default_factory=dict)  # member -> its public keys in hexadecimal
    threshold: int = 0
    survivors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Masking:
    """How a client hides its update in the sum of a round's."""

    context: str
    weight: float  # p: its share, of shares that sum to 1
    reach: float  # largest change of a number
    members: int
    inbox: Mapping[int, str]  # sender -> its shares for this client, sealed, in hexadecimal
    clip: float = 0.0  # largest norm of the whole update, in a run that hides clients; 0: as it is


@dataclass(frozen=True)
class Spent:
    """What a client's ledger says after a round."""

    epsilon: float  # of all its charges, at the run's delta
    charges: int


@dataclass(frozen=True, eq=False)
class Job:
    """Server to client: one round's work, complete in itself."""

    start: LoRA  # where local training starts
    trains: str = "ABH"  # the sides that are trained
    shares: str = "ABH"  # the sides that are sent back; what is trained and not sent the client keeps for next time
    offset: tuple[LoRA, ...] = ()  # of any rank, all added to the pretrained weights (absolute, not since last time)
    sketch: Mapping[str, Sequence[int]] = field(default_factory=dict)  # train only these rows of A and columns of B
    gain: Mapping[str, float] = field(default_factory=dict)  # module -> factor on s; the loop sets it for a sketch
    resumes: bool = False  # go on from the A and B this client ended with, over an offset less their product
    example_clip: float = 0.0  # largest norm of one example's gradient; 0: gradients are of batches
    privacy: Privacy | None = None  # DP-SGD instead; the run fills it in, as all below
    masking: Masking | None = None  # of the update, by secure aggregation
    metrics: bool = True  # may the client tell its training loss?
    upload: Encoding = "float32"  # what its change travels in (see `compress`)
    feedback: bool = False  # and whether what rounding left out is added to its next
    training: Training = field(default_factory=Training)
    seed: int = 0  # of the run; every draw is seeded by it, its purpose, the client and the round
    round: int = 0  # from 0
    rounds: int = 1  # in the whole run


@dataclass(frozen=True, eq=False)
class Update:
    """Client to server: what one job came to."""

    lora: LoRA  # the shared sides, trained; of a job that resumes, A and B hold the change of the product
    examples: int
    loss: float | None  # mean over the round's training; None where it is not to be told
    spent: Spent | None = None  # of a private job
    packed: "Packed | None" = None  # the change from the job's start as it travels, where `lora` is what that brings
    masked: Tensor | None = None  # of a job with masking, instead of the lora: (n,) int32, to be read as unsigned


State = TypeVar("State")


class Strategy(ABC, Generic[State]):
    """A federated LoRA algorithm: a frozen dataclass whose fields are its options.

    Its methods are pure: arguments are left alone, and all that changes between rounds is in `State`, which is made of
    `LoRA`, tensors, numbers, strings, and tuples, dicts, named tuples and dataclasses of these.
    """

    exact: ClassVar[bool] = False  # is the new model the weighted mean of the clients' models, W + s B A?
    mixed_ranks: ClassVar[bool] = False  # may clients have different ranks?
    sums_only: ClassVar[bool] = False  # does `aggregate` need no more than weighted sums of the updates?
    continues: ClassVar[bool] = False  # is a client alone followed factor by factor: no re-start, no change of basis?
    kinds: ClassVar[tuple[str, ...]] = ("lora",)  # the adapters it has a meaning for: of lora, dora, vera
    up: ClassVar[str] = ""  # numbers a client sends a round and module, as `fedlora strategies` explains it
    down: ClassVar[str] = ""  # numbers it is sent, once it holds what stays the same

    @abstractmethod
    def init(self, lora: LoRA) -> State:
        """The state before the first round, from the adapter as PEFT made it (A random, B zero, head as it is)."""

    @abstractmethod
    def client_init(self, state: State, client: Client) -> Job:
        """What this client is to do this round; the run fills in `training`, `seed`, `round` and `rounds`."""

    @abstractmethod
    def aggregate(self, state: State, updates: Sequence[LoRA], weights: Sequence[float]) -> State:
        """The next state, from the shared sides of the clients that answered and their weights (any positive scale)."""

    @abstractmethod
    def adapter(self, state: State) -> LoRA:
        """What the run delivers: all to add to the pretrained weights, as one adapter of any rank, and the head."""

    def notes(self, state: State) -> Mapping[str, float]:
        """Figures of its own for the round's line in `rounds.jsonl`."""
        return {}


DECLARED = ("exact", "mixed_ranks", "sums_only", "continues", "kinds", "up", "down")


def declare(wrapper: Strategy[Any], inner: Strategy[Any], **other: Any) -> None:
    """Let a strategy that wraps another declare what that one does, but for what is given: for its `__post_init__`."""
    for name in DECLARED:
        object.__setattr__(wrapper, name, other.get(name, getattr(inner, name)))


def load(spec: str, **options: Any) -> Strategy[Any]:
    """Build the strategy that `spec` names, with its options.

    `spec` is the name of a built-in or of an entry point (`fedlora strategies` lists them), `package.module:Class`, or
    `flwr:Class` for a strategy of Flower's own, which then aggregates the factors.
    Raises `StrategyError` where there is none of that name, or it has no such option.

    >>> load("fedavg")
    FedAvg()
    """
    from .catalogue import build, find, foreign

    return foreign(spec, options) if spec.startswith("flwr:") else build(find(spec), options)
