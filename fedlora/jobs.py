"""The messages between the server and its clients, as values: jobs, updates, and the terms of privacy in them."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from torch import Tensor

from .lora import LoRA
from .sections import Encoding, Training

TRAINING = Training()  # of a job whose strategy leaves it to the run, which tells by this very object


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Steps of DP-SGD that a client has run, or is about to run."""

    noise: float  # sigma: the noise's standard deviation over the clip
    rate: float  # q: the probability that a record is in a step
    steps: int


@dataclass(frozen=True, eq=False)
class CompressedUpdate:
    """A change of factors in the encoding in which it travels."""

    encoding: Encoding
    numbers: LoRA  # the matrices, of that type
    scales: LoRA  # by the same names, a scale a row: (rows,) float32; empty except with int8

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales; those of the header that names them are not counted."""
        return sum(t.numel() * t.element_size() for part in (self.numbers, self.scales) for _, _, t in part.matrices())


@dataclass(frozen=True)
class Client:
    """What the server knows of a client."""

    id: int
    examples: int
    rank: int
    records: int = 0  # what a private run protects and draws: rows or examples; 0: not counted


HIGHEST_RANK = Client(id=0, examples=1, rank=2**31)  # whose job holds all of a state, as no rank is cut to a lower one


@dataclass(frozen=True, kw_only=True)
class PrivacyTerms:
    """The terms of a client's DP-SGD, which make its work in a round differentially private (docs/privacy.md)."""

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
class SecAggStep:
    """Server to client: a step of secure aggregation (see `fedlora.privacy.secure_aggregation`)."""

    step: Literal["join", "share", "reveal"]
    context: str  # the round, with a random word, so that no two attempts at a round have the same one
    _: KW_ONLY
    round: int = 0  # from 0; a client joins none of which, or of a later one, it has masked an update
    roster: Mapping[int, tuple[str, str, str]] = field(default_factory=dict)  # member -> its public keys in hexadecimal
    threshold: int = 0
    survivors: tuple[int, ...] = ()
    agreement: str = ""  # the hash of the run's agreement; none in a simulation


@dataclass(frozen=True, kw_only=True)
class MaskingTerms:
    """How a client masks its update, so that it can be read in the round's sum alone."""

    context: str
    weight: float  # p: the client's share, of shares that sum to 1
    reach: float  # the value range: largest change of a number
    members: int
    inbox: Mapping[int, str]  # sender -> its shares for this client, sealed, in hexadecimal
    clip: float = 0.0  # largest norm of the whole update, in a run that hides clients; 0: not clipped


@dataclass(frozen=True, kw_only=True)
class PrivacySpent:
    """What a client's ledger has been charged with after a round."""

    epsilon: float  # of all its charges, at the run's delta
    charges: int


@dataclass(frozen=True, eq=False)
class Job:
    """Server to client: the work of one round, which needs no message before it."""

    start: LoRA  # where local training starts
    trains: str = "ABH"  # the sides that are trained
    shares: str = "ABH"  # the sides that are sent back; a side that is trained and not sent the client keeps
    offset: tuple[LoRA, ...] = ()  # of any rank, all added to the pretrained weights as they were before any round
    sketch: Mapping[str, Sequence[int]] = field(default_factory=dict)  # train only these rows of A and columns of B
    gain: Mapping[str, float] = field(default_factory=dict)  # module -> factor on s; a sketch brings one of its own
    resumes: bool = False  # go on from the A and B this client ended with, over an offset less their product
    example_clip: float = 0.0  # largest norm of one example's gradient; 0: gradients are of batches
    overrides: Mapping[str, float | int | str] = field(default_factory=dict)  # training settings unlike the run's
    lr_factor: float = 1.0  # on the learning rates of the run, or of the overrides
    privacy: PrivacyTerms | None = None  # DP-SGD instead. The run fills in this and all below, and a strategy sets none
    masking: MaskingTerms | None = None  # of the update, by secure aggregation
    metrics: bool = True  # may the client tell its training loss?
    upload: Encoding = "float32"  # in which the client's change travels (see `messages.compression`)
    feedback: bool = False  # is the rounding error of this change added to the client's next one?
    training: Training = TRAINING  # the run's settings, with those that are overridden
    seed: int = 0  # of the run; every draw is seeded by it, its purpose, the client and the round
    round: int = 0  # from 0
    rounds: int = 1  # in the whole run


@dataclass(frozen=True, eq=False)
class Update:
    """Client to server: the result of one job."""

    lora: LoRA  # the shared sides, trained; of a job that resumes, A and B hold the change of the product
    examples: int
    loss: float | None  # mean over the round's training; None where it is not to be told
    spent: PrivacySpent | None = None  # of a private job
    packed: CompressedUpdate | None = None  # the change from the job's start as it travels; `lora` is decoded from it
    masked: Tensor | None = None  # of a job with masking, instead of the lora: (n,) int32, to be read as unsigned
