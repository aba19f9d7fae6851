"""Jobs and updates as values, with the numbers in them; the plain values in them are in `fedlora.message_types`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .lora import LoRA
from .message_types import Charge, Client, MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep
from .sections import Encoding, Training

__all__ = [
    "HIGHEST_RANK",
    "TRAINING",
    "Charge",
    "Client",
    "CompressedUpdate",
    "Job",
    "MaskingTerms",
    "PrivacySpent",
    "PrivacyTerms",
    "SecAggStep",
    "Update",
]
TRAINING = Training()  # of a job whose strategy leaves it to the run, which tells by this very object


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


HIGHEST_RANK = Client(id=0, examples=1, rank=2**31)  # whose job holds all of a state, as no rank is cut to a lower one


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
