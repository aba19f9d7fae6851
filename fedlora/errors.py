"""What can go wrong, as a tree of exceptions; the commands catch the root and print one sentence.

FedloraError
├── ConfigError
├── DataError
├── ModelError
├── StrategyError
├── PrivacyError
│   └── PolicyRefusal
├── SecureError
│   ├── MaskedBefore
│   └── SumLost
├── LedgerError
├── ClientFailed
│   ├── TrainingDiverged
│   └── PrivateJobFailed
├── WireError
├── RoundFailed
├── CheckpointError
├── ExportError
└── MemoryShort
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from errno import EDQUOT, ENOSPC

from .reasons import FailureKind as FailureKind
from .reasons import ReasonCode as ReasonCode

MOST_KNOWN = 40  # words that an error lists


class StopRun(Exception):
    """Raised by a caller's function of each round (`on_round` of `fedlora.simulate`): the run ends with that round."""


class FedloraError(Exception):
    """Every mistake that a user can mend; its text is one sentence with the value, the place and the remedy.

    Where it ends a client's work, the sentence stays with the client, and the code is all that the server is told.
    """

    code = ReasonCode.ERROR

    def __init__(self, sentence: str = "", *, code: ReasonCode | None = None) -> None:
        """`code`: a more exact one than that of the class."""
        super().__init__(sentence)
        self.code = code or type(self).code


class ConfigError(FedloraError):
    """An unknown key, a value of the wrong type, or settings that contradict each other."""

    code = ReasonCode.SETTINGS


class DataError(FedloraError):
    """A file, a line, a column or a split of the data that cannot be used."""

    code = ReasonCode.DATA


class ModelError(FedloraError):
    """A base model that cannot be loaded, or that cannot take the adapter that was asked for."""

    code = ReasonCode.MODEL


class StrategyError(FedloraError):
    """A strategy that cannot be found or built, or that returned what no client can load."""

    code = ReasonCode.MODEL


class PrivacyError(FedloraError):
    """A privacy guarantee that cannot be given: the settings contradict it, or the model cannot have it."""

    code = ReasonCode.PRIVACY


class PolicyRefusal(PrivacyError):
    """A client's own policy, or its agreement with the run, does not allow what was asked for."""

    code = ReasonCode.POLICY


class SecureError(FedloraError):
    """Secure aggregation stops: going on would reveal a client's update, or give a wrong sum."""

    code = ReasonCode.MASKING


class MaskedBefore(SecureError):
    """This client has masked an update of this round before; a second sum with it could give it away."""

    code = ReasonCode.MASKED


class SumLost(SecureError):
    """All that had to answer did, and what one of them sent leaves no sum of theirs: the round is skipped."""

    code = ReasonCode.MASKED

    def __init__(self, sentence: str, member: int | None = None) -> None:
        """`member` is the one whose doing it is, where that can be told."""
        super().__init__(sentence)
        self.member = member


class LedgerError(FedloraError):
    """A client's privacy ledger is lost, altered, of other data, or has no room for what a job would spend."""

    code = ReasonCode.LEDGER


class ClientFailed(FedloraError):
    """One client could not do its job; the round goes on without it."""

    code = ReasonCode.FAILED


class TrainingDiverged(ClientFailed):
    """A client's loss or adapter is not finite."""

    code = ReasonCode.DIVERGED


class PrivateJobFailed(ClientFailed):
    """A job failed after its charge. The sentence is the same for all causes, as the cause may tell of the records."""

    def __init__(self) -> None:
        super().__init__("a private job failed after it was charged; the cause is in this client's own log")


class WireError(FedloraError):
    """A message that is damaged, or is not what it says it is."""

    code = ReasonCode.MESSAGE


class RoundFailed(FedloraError):
    """Too few clients answered."""


class CheckpointError(FedloraError):
    """A run's state could not be written or read."""

    code = ReasonCode.DISK


class MemoryShort(FedloraError):
    """A run that takes more memory than there is, found before it starts."""

    code = ReasonCode.MEMORY


class ExportError(FedloraError):
    """What was exported, loaded afresh, is not the run's model; or it could not be written."""


def cut(value: object, most: int = 40) -> str:
    """The value as text on one line, the start of it if it is long, as an error shows it.

    >>> cut("a text of many, many words", 11)
    'a text of m...'
    """
    text = " ".join(str(value)[: 2 * most + 2].split()) if len(str(value)) > most else str(value)
    return f"{text[:most]}..." if len(text) > most else text


def nearest(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them, up to a few dozens.

    Capitals do not count, nor how a number is written. `otherwise` stands in place of a list of all that is known.

    >>> nearest("lora.rnk", ["lora.rank", "seed"])
    'did you mean "lora.rank"?'
    >>> nearest("0", ["0.0", "1.0"])
    'did you mean "0.0"?'
    """
    known = sorted(known)
    same = [name for name in known if _number(word) is not None and _number(name) == _number(word)]
    plain = {name.strip().casefold(): name for name in known}
    close = same or [plain[name] for name in get_close_matches(word.strip().casefold(), plain, n=1, cutoff=0.5)]
    if close:
        return f'did you mean "{cut(close[0])}"?'
    return otherwise or _listed(known)


def _listed(known: Sequence[str]) -> str:
    """The known words, up to a few dozens."""
    more = f" and {len(known) - MOST_KNOWN} more" if len(known) > MOST_KNOWN else ""
    return f"known are: {', '.join(map(cut, known[:MOST_KNOWN])) or 'none'}{more}"


def _number(word: str) -> float | None:
    """The number that a word stands for, if it stands for one."""
    try:
        return float(word)
    except ValueError:
        return None


@dataclass(frozen=True)
class Failure:
    """Why a client has no answer in a round."""

    reason: str  # one sentence
    kind: FailureKind = FailureKind.ERROR
    code: ReasonCode | None = None  # where the client itself gives the reason
    sent: bool = field(default=True, compare=False)  # was the client sent its job, so that it may have been charged?

    @property
    def public(self) -> str:
        """The sentence for a run directory, which is passed on: without what a client's own sentence may tell."""
        return self.code.sentence if self.code else self.reason

    @classmethod
    def because_of(cls, error: BaseException) -> "Failure":
        """The failure of a client whose work this error ended, with the sentence that stays with the client."""
        sentence = str(error) if isinstance(error, FedloraError) else f"{type(error).__name__}: {error}"
        code = _code_of(error)
        return cls(sentence, code.kind, code)

    @classmethod
    def told(cls, word: str) -> "Failure":
        """The failure that a client tells of by a code, in that code's own sentence; any other word is no reason.

        >>> Failure.told("memory").kind, Failure.told("ssn 100-45-6000").reason
        (<FailureKind.MEMORY: 'memory'>, 'it gave no reason that is known here')
        """
        if word not in frozenset(ReasonCode):
            return cls("it gave no reason that is known here")
        code = ReasonCode(word)
        return cls(code.sentence, code.kind, code)

    @classmethod
    def parse(cls, text: str) -> "Failure":
        """The failure that `dumps` wrote, sentence and all: of a simulation, whose clients are on this very machine."""
        word, _, sentence = text.partition(": ")
        return replace(cls.told(word), reason=sentence) if word in frozenset(ReasonCode) else cls(text)

    def dumps(self) -> str:
        """The code and the sentence as one text, which may not leave this machine."""
        return f"{self.code or ReasonCode.ERROR}: {self.reason}"


def _code_of(error: BaseException) -> ReasonCode:
    """The code of the failure that an error means for the client whose work it ended."""
    if _is_full_disk(error) or _is_full_disk(error.__cause__):
        return ReasonCode.DISK
    if isinstance(error, FedloraError):
        return error.code
    out_of_memory = {"MemoryError", "OutOfMemoryError"} & {cls.__name__ for cls in type(error).__mro__}  # torch's too
    return ReasonCode.MEMORY if out_of_memory else ReasonCode.ERROR


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
