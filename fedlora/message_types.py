"""Every value that a message can hold, with its bounds: all that server and client believe of each other unseen.

A message is a head of plain values, of one of the types `...Head`, `...Info`, `...Reply` and `...Step` below or the
run's agreement (`fedlora.messages.agreement`), and at most one array of numbers (see `fedlora.messages.codec`). Both
sides read a head by its type before any other code sees it. A number that is not finite or lies outside its bounds, a
text of other letters, a list that is too long, a field that is missing or not known: the message is refused as a whole.
What a job asks for within these bounds is then held against the client's own policy, and the numbers against the
model's shapes.

The bounds are where nothing sensible is lost: they keep a message from hanging, filling or misleading whoever reads it.
They are not what a client agrees to; that is its policy.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import isfinite
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, ConfigDict, StringConstraints
from pydantic.dataclasses import dataclass as checked

from .errors import PrivacyError
from .sections import Encoding, GradientEngine, Training

MOST_COUNT = 10**12  # of examples, records, targets, charges
MOST_ROUNDS = 10**7
MOST_STEPS = 10**7  # of DP-SGD in a round
MOST_ID = 2**31 - 1  # of a client
MOST_RANK = 2**20  # that a client may say it has
MOST_MODULES = 2**14  # in a table with an entry a module
MOST_ROWS = 2**16  # of a sketch, in a module
MOST_PARTS = 2**14  # of a job: one a side, and one a residual that was not merged yet
MOST_REPEATS = 16  # of one part in a job
MOST_TURNS = 2**12  # local steps after which a job's turns begin anew
MOST_TAPS = 101  # of a filter
MOST_MEMBERS = 2**14  # of a round of secure aggregation
MOST_LOSS = 1e6  # of a mean over targets: beyond it training has diverged
MOST_EPSILON = 1e18  # beyond all meaning, but a ledger may hold such charges

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _no_side_twice(sides: str) -> str:
    if len(set(sides)) < len(sides):
        raise ValueError("a side is named twice")
    return sides


def _no_row_twice(rows: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(rows)) < len(rows):
        raise ValueError("a row is named twice")
    return rows


def _few_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    if max(Counter(names).values(), default=0) > MOST_REPEATS:
        raise ValueError(f"a part is named more than {MOST_REPEATS} times")
    return names


def _a_filter(taps: tuple[float, ...]) -> tuple[float, ...]:
    if taps and (len(taps) % 2 == 0 or taps != taps[::-1] or abs(sum(taps) - 1) > 1e-6):
        raise ValueError("taps are an odd number, the same from either end, and sum to 1")
    return taps


def check_turns(turns: tuple[str, ...], trains: str) -> None:
    """Raise `ValueError` for turns in which another side is trained than the job trains, or one of these never is."""
    if turns and set("".join(turns)) != set(trains):
        raise ValueError(f"turns train {''.join(sorted(set(''.join(turns))))}, and the job {trains}")


Count = Annotated[int, Ge(0), Le(MOST_COUNT)]
Some = Annotated[int, Ge(1), Le(MOST_COUNT)]
ClientId = Annotated[int, Ge(0), Le(MOST_ID)]
Loss = Annotated[float, Ge(-MOST_LOSS), Le(MOST_LOSS)]
SumOfLosses = Annotated[float, Ge(-MOST_LOSS * MOST_COUNT), Le(MOST_LOSS * MOST_COUNT)]
Norm = Annotated[float, Gt(1e-20), Lt(1e20)]  # beyond these a product of two in float32 is 0, denormal or infinite
NormOrNone = Annotated[float, Ge(0), Lt(1e20)]  # 0: not clipped
Round = Annotated[int, Ge(0), Lt(MOST_ROUNDS)]
Sides = Annotated[str, StringConstraints(pattern="^[ABRDH]*$", max_length=5), AfterValidator(_no_side_twice)]
Turn = Annotated[str, StringConstraints(pattern="^[ABRH]+$", max_length=4), AfterValidator(_no_side_twice)]
Turns = Annotated[tuple[Turn, ...], Len(0, MOST_TURNS)]
Taps = Annotated[tuple[Annotated[float, Ge(-10), Le(10)], ...], Len(0, MOST_TAPS), AfterValidator(_a_filter)]
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=500)]
PartName = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]  # SHA-256 of the part's bytes
PartNames = Annotated[tuple[PartName, ...], Len(0, MOST_PARTS), AfterValidator(_few_repeats)]
Rows = Annotated[tuple[Annotated[int, Ge(0), Lt(MOST_RANK)], ...], Len(1, MOST_ROWS), AfterValidator(_no_row_twice)]
Context = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9 ().:\-]+$", max_length=200)]  # names a masked round
PublicKey = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Sealed = Annotated[str, StringConstraints(pattern="^[0-9a-f]{2,1024}$")]  # shares, encrypted for one member
Word = Annotated[str, StringConstraints(pattern="^[a-z0-9_]+$", max_length=40)]
Spoken = Annotated[str, StringConstraints(pattern="^[0-9a-f]+$", max_length=1024)]  # a count, or bytes in hexadecimal
Stage = Literal["round", "personal", "alone"]  # of a run: its rounds, or what each client then does for itself
AgreementHash = Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")]  # none in a simulation
Fingerprint = Annotated[str, StringConstraints(pattern="^[0-9a-f]*$", max_length=64)]


# Values that a job or an answer holds. They are built in many places, and held to their bounds where they are read.


@dataclass(frozen=True)
class Client:
    """What the server knows of a client."""

    id: ClientId
    examples: Count
    rank: Annotated[int, Ge(1), Le(MOST_RANK)]
    records: Count = 0  # what a private run protects and draws: rows or examples; 0: not counted


@dataclass(frozen=True, kw_only=True)
class PrivacyTerms:
    """The terms of a client's DP-SGD, which make its work in a round differentially private (docs/privacy.md)."""

    noise: Annotated[float, Ge(1e-3), Le(1e6)]  # sigma: the noise's standard deviation over the clip
    clip: Norm  # C: the largest norm of one record's gradient over all that is trained
    head_share: Annotated[float, Gt(0), Lt(1)]  # of C^2, for the head, where it is trained too: C_A^2 + C_H^2 = C^2
    rate: Annotated[float, Gt(0), Le(1)]  # q: the probability that a record is in a step, each by itself
    steps: Annotated[int, Ge(1), Le(MOST_STEPS)]  # in a round
    delta: Annotated[float, Gt(0), Lt(1)]
    engine: GradientEngine = "auto"  # of the gradients of single examples
    seeded: bool = False  # noise and samples from the run's seed: an experiment, and NOT PRIVATE
    known: Count = 0  # charges in this client's ledger that the server has seen: one with fewer has lost some


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Steps of DP-SGD that a client has run, or is about to run.

    Raises `PrivacyError` for a charge that would pay a ledger back. Its bounds are wider than those of `PrivacyTerms`:
    ledgers hold charges of older versions, and none of these may be forgotten.
    """

    noise: float  # sigma: the noise's standard deviation over the clip; 0: no privacy at all
    rate: float  # q: the probability that a record is in a step
    steps: int

    def __post_init__(self) -> None:
        are_numbers = isfinite(self.noise) and isfinite(self.rate) and isinstance(self.steps, int)
        if not (are_numbers and self.noise >= 0 and 0 <= self.rate <= 1 and self.steps >= 0):
            raise PrivacyError(
                f"a charge of noise {self.noise!r}, rate {self.rate!r} and {self.steps!r} steps cannot be: noise is 0 "
                "or more, the rate 0 to 1, steps a whole number of 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class PrivacySpent:
    """What a client's ledger has been charged with after a round."""

    epsilon: Annotated[float, Ge(0), Le(MOST_EPSILON)]  # of all its charges, at the run's delta
    charges: Count


@dataclass(frozen=True, kw_only=True)
class MaskingTerms:
    """How a client masks its update, so that it can be read in the round's sum alone."""

    context: Context
    weight: Annotated[float, Gt(0), Le(1)]  # p: the client's share, of shares that sum to 1
    reach: Annotated[float, Ge(1e-30), Le(1e30)]  # the value range: largest change of a number
    members: Annotated[int, Ge(1), Le(MOST_MEMBERS)]
    inbox: Annotated[Mapping[ClientId, Sealed], Len(0, MOST_MEMBERS)]  # sender -> its shares for this client
    clip: NormOrNone = 0.0  # largest norm of the whole update, in a run that hides clients; 0: not clipped


# Server to client.


@dataclass(frozen=True)
class SecAggStep:
    """Server to client: a step of secure aggregation (see `fedlora.privacy.secure_aggregation`)."""

    __pydantic_config__ = STRICT  # as it is a head of its own
    step: Literal["join", "share", "reveal"]
    context: Context  # the round, with a random word, so that no two attempts at a round have the same one
    _: KW_ONLY
    round: Round = 0  # from 0; a client joins none of which, or of a later one, it has masked an update
    roster: Annotated[Mapping[ClientId, tuple[PublicKey, PublicKey, PublicKey]], Len(0, MOST_MEMBERS)] = field(
        default_factory=dict
    )  # member -> its public keys in hexadecimal
    threshold: Annotated[int, Ge(0), Le(MOST_MEMBERS)] = 0
    survivors: Annotated[tuple[ClientId, ...], Len(0, MOST_MEMBERS)] = ()
    agreement: AgreementHash = ""  # the hash of the run's agreement, which the step is bound to
    exchange: Annotated[int, Ge(0), Le(1)] = 0  # the round's first pass over its clients, or the second


@checked(frozen=True, config=STRICT)
class JobHead:
    """A Job without the numbers, which are in its parts."""

    trains: Sides
    shares: Sides
    sketch: Annotated[dict[Module, Rows], Len(0, MOST_MODULES)]  # held against the ranks once the parts are there
    gain: Annotated[dict[Module, Annotated[float, Ge(-1e6), Le(1e6)]], Len(0, MOST_MODULES)]
    resumes: bool
    example_clip: NormOrNone
    privacy: PrivacyTerms | None
    masking: MaskingTerms | None
    metrics: bool
    upload: Encoding
    feedback: bool
    training: Training
    seed: Annotated[int, Ge(0), Lt(2**64)]
    round: Round
    rounds: Annotated[int, Ge(1), Le(MOST_ROUNDS)]
    start: PartNames  # names of its parts, by the sides' order
    offset: PartNames
    sent: Annotated[tuple[tuple[PartName, Annotated[int, Ge(0), Lt(2**48)]], ...], Len(0, MOST_PARTS)]
    # ^ (name, bytes) of each part in the array, in order
    agreement: AgreementHash = ""  # the hash of the run's agreement, which the job is bound to
    right: PartNames = ()  # of the projections, held against the sizes once they are there
    left: PartNames = ()
    turns: Turns = ()
    smoothing: Taps = ()
    scales: bool = False
    keeps_rank: Annotated[int, Ge(0), Lt(MOST_RANK)] = 0  # held against the ranks once the parts are there
    stage: Stage = "round"
    correction: PartNames = ()

    def __post_init__(self) -> None:
        check_turns(self.turns, self.trains)


# Client to server. Beside these a client sends a `ReasonCode`, and nothing else.


@checked(frozen=True, config=STRICT)
class ClientInfo:
    """A client's answer to the question who it is."""

    client: Client
    base: Fingerprint  # of its base model


@checked(frozen=True, config=STRICT)
class UpdateHead:
    """An Update without its numbers."""

    examples: Some
    loss: Loss | None
    spent: PrivacySpent | None
    name: PartName  # hash of the array's bytes
    round: Round
    kind: Literal["update"] = "update"


@checked(frozen=True, config=STRICT)
class MetricsHead:
    """Metrics without their table of sums."""

    examples: Some
    targets: Some
    loss: SumOfLosses  # over the targets, whose mean is bounded as any loss
    correct: Count
    kind: Literal["metrics"] = "metrics"

    def __post_init__(self) -> None:
        if not abs(self.loss) <= MOST_LOSS * self.targets:
            raise ValueError(f"a loss of {self.loss:g} over {self.targets} targets is beyond {MOST_LOSS:g} for each")
        if self.correct > self.targets:
            raise ValueError(f"{self.correct} of {self.targets} targets cannot be right")


@checked(frozen=True, config=STRICT)
class MissingParts:
    """The answer of a client that does not have all parts of a job: it needs the job in full."""

    lacks: Annotated[tuple[PartName, ...], Len(1, 2 * MOST_PARTS)]  # names of the parts
    kind: Literal["lacks"] = "lacks"


@checked(frozen=True, config=STRICT)
class SecAggReply:
    """A client's answer in a step of secure aggregation."""

    said: Annotated[dict[Word, Spoken], Len(0, MOST_MEMBERS)]
