"""What can go wrong, as a tree of exceptions; the commands catch the root and print one sentence.

FedloraError
├── ConfigError
├── DataError
├── ModelError
├── StrategyError
├── PrivacyError
├── SecureError
│   └── MaskedBefore
├── LedgerError
├── ClientFailed
│   └── TrainingDiverged
├── WireError
├── RoundFailed
├── CheckpointError
└── ExportError
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from errno import EDQUOT, ENOSPC
from typing import ClassVar


class FailureKind(StrEnum):
    """What kept a client from answering; the words are values of the label `reason` of Prometheus' metrics too."""

    LATE = "late"  # no answer in time
    OFFLINE = "offline"  # the client could not be reached, and may be asked again
    CRASHED = "crashed"  # a process of the client ended
    DAMAGED = "damaged"  # what the server sent arrived damaged
    REFUSED = "refused"  # an answer came, and did not pass the server's checks
    DISK = "disk"  # no room on the client's disk
    SECURE = "secure"  # secure aggregation could not go on
    MASKED = "masked"  # its update of this round went out under a mask, and no sum with it could be read
    PRIVACY = "privacy"  # the client would have given away more than it may
    DIVERGED = "diverged"  # the loss or the adapter is not finite
    MEMORY = "memory"  # too little memory
    ERROR = "error"  # anything else


class FedloraError(Exception):
    """Every mistake that a user can mend; its text is one sentence with the value, the place and the remedy."""

    kind: ClassVar[FailureKind] = FailureKind.ERROR  # of the failure, where the error ends a client's work


class ConfigError(FedloraError):
    """An unknown key, a value of the wrong type, or settings that contradict each other."""


class DataError(FedloraError):
    """A file, a line, a column or a split of the data that cannot be used."""


class ModelError(FedloraError):
    """A base model that cannot be loaded, or that cannot take the adapter that was asked for."""


class StrategyError(FedloraError):
    """A strategy that cannot be found or built, or that returned what no client can load."""


class PrivacyError(FedloraError):
    """A privacy guarantee that cannot be given: the settings contradict it, or the model cannot have it."""

    kind = FailureKind.PRIVACY


class SecureError(FedloraError):
    """Secure aggregation stops: going on would reveal a client's update, or give a wrong sum."""

    kind = FailureKind.SECURE


class MaskedBefore(SecureError):
    """This client has masked an update of this round before; a second sum with it could give it away."""

    kind = FailureKind.MASKED


class LedgerError(FedloraError):
    """A client's privacy ledger is lost, altered, of other data, or has no room for what a job would spend."""

    kind = FailureKind.PRIVACY


class ClientFailed(FedloraError):
    """One client could not do its job; the round goes on without it."""


class TrainingDiverged(ClientFailed):
    """A client's loss or adapter is not finite."""

    kind = FailureKind.DIVERGED


class WireError(FedloraError):
    """A message that is damaged, or is not what it says it is."""

    kind = FailureKind.DAMAGED


class RoundFailed(FedloraError):
    """Too few clients answered."""


class CheckpointError(FedloraError):
    """A run's state could not be written or read."""

    kind = FailureKind.DISK


class ExportError(FedloraError):
    """What was exported, loaded afresh, is not the run's model; or it could not be written."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them.

    >>> nearest("lora.rnk", ["lora.rank", "seed"])
    'did you mean "lora.rank"?'
    """
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are: {', '.join(known) or 'none'}"


@dataclass(frozen=True)
class Failure:
    """Why a client has no answer in a round."""

    reason: str  # one sentence
    kind: FailureKind = FailureKind.ERROR
    sent: bool = field(default=True, compare=False)  # was the client sent its job, so that it may have been charged?

    @classmethod
    def because_of(cls, error: BaseException) -> "Failure":
        """The failure of a client whose work this error ended."""
        sentence = str(error) if isinstance(error, FedloraError) else f"{type(error).__name__}: {error}"
        return cls(sentence, _kind_of(error))

    @classmethod
    def parse(cls, text: str) -> "Failure":
        """The failure that a client sent with `dumps`. A first word that no client may say is part of the sentence.

        >>> Failure.parse("memory: too little").kind, Failure.parse("late: so it says").kind
        (<FailureKind.MEMORY: 'memory'>, <FailureKind.ERROR: 'error'>)
        """
        word, colon, sentence = text.partition(": ")
        if colon and word in CLIENT_KINDS:
            return cls(sentence, FailureKind(word))
        return cls(text)

    def dumps(self) -> str:
        """The kind and the sentence as one text, for the server."""
        return f"{self.kind}: {self.reason}"


# The kinds that a client may give itself; whether an answer is late or refused, the server alone knows.
CLIENT_KINDS = frozenset(FailureKind) - {FailureKind.LATE, FailureKind.OFFLINE, FailureKind.REFUSED}


def _kind_of(error: BaseException) -> FailureKind:
    """The kind of the failure that an error means for the client whose work it ended."""
    if _is_full_disk(error) or _is_full_disk(error.__cause__):
        return FailureKind.DISK
    if isinstance(error, FedloraError):
        return error.kind
    out_of_memory = {"MemoryError", "OutOfMemoryError"} & {cls.__name__ for cls in type(error).__mro__}  # torch's too
    return FailureKind.MEMORY if out_of_memory else FailureKind.ERROR


def _is_full_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
