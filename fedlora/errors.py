"""What can go wrong, as a tree; the commands catch the root and print one sentence.

FedloraError
├── ConfigError       an unknown key, a value of the wrong type, two settings that contradict each other
├── DataError         a file, a line, a column or a split that cannot be used
├── ModelError        a model that cannot be loaded, or cannot wear the adapter that was asked for
├── StrategyError     a strategy that cannot be found or built, or that returned what no client can load
├── PrivacyError      a guarantee that could not be given: what was asked contradicts itself, or a model cannot have it
├── SecureError       secure aggregation stops: to go on would give a client's update away, or bring out a wrong sum
├── LedgerError       a client's ledger is lost, altered, of other data, or has no room for what a job would spend
├── ClientFailed      one client could not do its job; the round goes on without it
├── WireError         a message that is damaged, or not what it says it is
├── RoundFailed       too few clients answered
├── CheckpointError   a run's state could not be written or read
└── ExportError       what was exported, loaded afresh, is not the run's model, or could not be written
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FedloraError(Exception):
    """Every mistake that a user can mend; its text is one sentence with the value, the place and the remedy."""


class ConfigError(FedloraError):
    pass


class DataError(FedloraError):
    pass


class ModelError(FedloraError):
    pass


class StrategyError(FedloraError):
    pass


class PrivacyError(FedloraError):
    pass


class SecureError(FedloraError):
    pass


class LedgerError(FedloraError):
    pass


class ClientFailed(FedloraError):
    pass


class WireError(FedloraError):
    pass


class RoundFailed(FedloraError):
    pass


class CheckpointError(FedloraError):
    pass


class ExportError(FedloraError):
    pass


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them.

    >>> nearest("lora.rnk", ["lora.rank", "seed"])
    'did you mean "lora.rank"?'
    """
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are: {', '.join(known) or 'none'}"
