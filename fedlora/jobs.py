"""Jobs and updates as values, with the numbers in them; the plain values in them are in `fedlora.message_types`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil

from torch import Tensor

from .lora import SIDES, LoRA, Side, append_rank, at_least_float32, split_rank
from .message_types import Charge, Client, MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep, Stage
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
    "count_steps",
    "holds_scales",
    "is_personal",
    "is_projected",
    "kept_part",
    "own_sides",
    "sent_sides",
    "shared_part",
    "shared_start",
    "start_with",
    "trained_letters",
    "trains_scales",
    "why_no_projection",
    "why_rows_cannot_stay",
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
    keeps_rank: int = 0  # of the last rows of A and columns of B, so many stay with the client: it goes on from its own
    offset: tuple[LoRA, ...] = ()  # of any rank, all added to the pretrained weights as they were before any round
    sketch: Mapping[str, Sequence[int]] = field(default_factory=dict)  # train only these rows of A and columns of B
    gain: Mapping[str, float] = field(default_factory=dict)  # module -> factor on s; a sketch brings one of its own
    resumes: bool = False  # go on from the A and B this client ended with, over an offset less their product
    right: Side = field(default_factory=dict)  # (d_in, w): of the trained product B (A right) is sent, as B, and no A
    left: Side = field(
        default_factory=dict
    )  # (d_out, w): of what was trained in this round, (left^T B) A is sent, as A
    example_clip: float = 0.0  # largest norm of one example's gradient; 0: gradients are of batches
    correction: LoRA = field(default_factory=LoRA)  # added to the gradient of every step; of sides that are trained
    scales: bool = False  # train a scale of each head of R too, from 1, and send heads times scales; not under DP-SGD
    overrides: Mapping[str, float | int | str] = field(default_factory=dict)  # training settings unlike the run's
    lr_factor: float = 1.0  # on the learning rates of the run, or of the overrides
    turns: tuple[str, ...] = ()  # sides of each local step, over and over; empty: all of `trains` in every step
    smoothing: tuple[float, ...] = ()  # taps of a filter on each step's gradient of A and B, along their features
    privacy: PrivacyTerms | None = None  # DP-SGD instead. The run fills in this and all below, and a strategy sets none
    masking: MaskingTerms | None = None  # of the update, by secure aggregation
    metrics: bool = True  # may the client tell its training loss?
    upload: Encoding = "float32"  # in which the client's change travels (see `messages.compression`)
    feedback: bool = False  # is the rounding error of this change added to the client's next one?
    training: Training = TRAINING  # the run's settings, with those that are overridden
    seed: int = 0  # of the run; every draw is seeded by it, its purpose, the client and the round
    round: int = 0  # from 0
    rounds: int = 1  # in the whole run
    stage: Stage = "round"  # any other is a client's work for its own use, after that round: nothing of it is sent

    def sides_of(self, step: int) -> str:
        """The sides that a local step of the round, counted from 0, trains."""
        return self.turns[step % len(self.turns)] if self.turns else self.trains

    @property
    def each_turn(self) -> tuple[str, ...]:
        """The sets of sides that local steps train, each once."""
        return tuple(dict.fromkeys(self.turns)) or (self.trains,)

    def stretches(self, steps: int) -> Iterator[tuple[str, list[int]]]:
        """Yield the round's local steps in order, with those beside each other that train the same sides in one."""
        for sides, stretch in groupby(range(steps), key=self.sides_of):
            yield sides, list(stretch)


def shared_start(job: Job) -> LoRA:
    """What a client sends back for this job, as it is before any training: from it the client's change is counted.

    Its matrices are those of an update, in their shapes. A projection of a product counts from zero.
    """
    if not is_projected(job):
        return shared_part(job, job.start)
    A = {m: x.new_zeros(x.shape[1], job.start.A[m].shape[1]) for m, x in job.left.items()}  # (w, d_in)
    B = {m: x.new_zeros(job.start.B[m].shape[0], x.shape[1]) for m, x in job.right.items()}  # (d_out, w)
    return LoRA(A, B).over(job.start.only(_besides_factors(job)))


def shared_part(job: Job, lora: LoRA) -> LoRA:
    """What of a client's adapter it sends back: the shared sides, without the rows of the rank that it keeps.

    Or a projection of its product, beside the head; of a stage that a client does for its own use that is nothing.
    """
    if job.stage != "round":
        return LoRA()
    if not is_projected(job):
        return split_rank(lora.only(job.shares), job.keeps_rank)[0]
    factors = {m: (at_least_float32(b), at_least_float32(lora.A[m])) for m, b in lora.B.items()}
    A = {m: (x.to(factors[m][0]).T @ factors[m][0]) @ factors[m][1] for m, x in job.left.items()}
    B = {m: factors[m][0] @ (factors[m][1] @ x.to(factors[m][1])) for m, x in job.right.items()}
    return LoRA(A, B).over(lora.only(_besides_factors(job)))


def is_projected(job: Job) -> bool:
    """Does a client send a projection of the product that it trained, in place of the factors?"""
    return bool(job.right or job.left)


def own_sides(job: Job) -> str:
    """The letters of the sides that a client trains, and that stay with it."""
    return "".join(s for s in SIDES if s in job.trains and s not in sent_sides(job))


def sent_sides(job: Job) -> str:
    """The letters of the sides of which a client sends something: both factors, where it sends a projection of them."""
    return "".join(s for s in SIDES if s in job.shares or (is_projected(job) and s in "AB"))


def why_no_projection(job: Job) -> str:
    """Why a client cannot send the projection that a job asks for, in a clause; empty where it can."""
    if not is_projected(job):
        return ""
    if any((job.sketch, job.resumes, job.gain, job.scales, job.start.R)):
        return "right and left go with no sketch, no gain, no core R, no scales and no factors that a client resumes"
    if not _has_its_sides(job):
        wanted = "with left it trains nothing and shares A" if job.left else "with right it trains A and B and shares B"
        return f"{wanted}, and this one trains {job.trains}, shares {job.shares}"
    if not _fits_the_modules(job):
        shapes = {m: tuple(x.shape) for m, x in (job.left or job.right).items()}
        return f"right is (d_in, w) and left (d_out, w) for every module, and here they are {shapes}"
    return ""


def _has_its_sides(job: Job) -> bool:
    """Does a job with projections train and share what goes with them?"""
    if job.left:
        return not job.right and (job.trains, job.shares) == ("", "A")
    return {*"AB"} <= {*job.trains} and "B" in job.shares and "A" not in job.shares


def _fits_the_modules(job: Job) -> bool:
    """Are a job's projections matrices with as many rows as the modules have inputs, or outputs?"""
    if any(t.dim() != 2 for _, _, t in job.start.only("AB").matrices()):
        return False
    rows = {m: len(b) if job.left else job.start.A[m].shape[1] for m, b in job.start.B.items()}
    return {m: (len(x), x.dim()) for m, x in (job.left or job.right).items()} == {m: (n, 2) for m, n in rows.items()}


def _besides_factors(job: Job) -> str:
    return "".join(s for s in job.shares if s not in "AB")


def is_personal(job: Job) -> bool:
    """Does a client keep something that it trains, so that no two have the same model?"""
    return bool(own_sides(job)) or job.keeps_rank > 0


def kept_part(job: Job, lora: LoRA) -> LoRA:
    """What of a client's adapter stays with it for its next job: whole sides, and the last rows of the others."""
    whole = _kept_whole(job)
    return lora.only(whole).over(split_rank(lora.only(_others(whole)), job.keeps_rank)[1])


def start_with(job: Job, kept: LoRA) -> LoRA:
    """The adapter that a client starts from: the job's, with what the client has kept in its place.

    Rows that are not of the shapes that stay by this job are of another one, and are left alone.
    """
    whole = _kept_whole(job)
    start = kept.only(whole).over(job.start)
    rows, wanted = kept.only(_others(whole)), kept_part(job, job.start).only(_others(whole))
    if not job.keeps_rank or _shapes(rows) != _shapes(wanted):
        return start
    others = split_rank(start.only(_others(whole)), job.keeps_rank)[0]
    return append_rank(others, rows).over(start)


def why_rows_cannot_stay(job: Job) -> str:
    """Why a job cannot have rows stay with its client, in a clause; empty where it can, or none are to stay."""
    if not job.keeps_rank:
        return ""
    lowest = min((len(a) for a in job.start.A.values()), default=0)
    if job.keeps_rank >= lowest:
        return f"{job.keeps_rank} rows are to stay with the client, and of rank {lowest} that leaves none to share"
    if any((job.sketch, job.resumes, job.start.R, is_projected(job))):
        return "rows are to stay with the client, which go with no sketch, core R, projection or resumed factors"
    if any(t.dim() < 2 for _, _, t in job.start.only("AB").matrices()):
        return "rows are to stay with the client, and VeRA's vectors have none"
    return ""


def _kept_whole(job: Job) -> str:
    return "".join(s for s in SIDES if s in own_sides(job) or (job.resumes and s in "AB"))


def _others(sides: str) -> str:
    """Those of A and B that are not among these sides."""
    return "".join(s for s in "AB" if s not in sides)


def _shapes(lora: LoRA) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(s, m): tuple(t.shape) for s, m, t in lora.matrices()}


def trained_letters(job: Job) -> str:
    """The sides whose parameters the job trains, with S for the scales of R's heads where it trains those too."""
    return job.trains + ("S" if trains_scales(job) else "")


def holds_scales(job: Job) -> bool:
    """Has the job a core that its heads' scales can be trained with in every step, and sent in?"""
    return bool(job.start.R) and "R" in job.trains and "R" in job.shares and not job.turns


def trains_scales(job: Job) -> bool:
    """Does the job train scales? Under DP-SGD they stay 1: their noise would multiply that of their heads."""
    return job.scales and job.privacy is None


@dataclass(frozen=True, eq=False)
class Update:
    """Client to server: the result of one job."""

    lora: LoRA  # the shared sides, trained; of a job that resumes, A and B hold the change of the product
    examples: int
    loss: float | None  # mean over the round's training; None where it is not to be told
    spent: PrivacySpent | None = None  # of a private job
    packed: CompressedUpdate | None = None  # the change from the job's start as it travels; `lora` is decoded from it
    masked: Tensor | None = None  # of a job with masking, instead of the lora: (n,) int32, to be read as unsigned


def count_steps(training: Training, n: int) -> int:
    """The count of optimizer steps of a client with n examples in one round."""
    if training.steps:
        return training.steps
    return max(1, round(training.epochs * ceil(n / (training.batch_size * training.accumulate))))
