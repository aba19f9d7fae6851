"""Why a client has no answer: the codes that may leave a client, each with the sentence that the server shows for it.

Of what goes wrong at a client nothing but such a code leaves it: no value, no name, no path, no column and no text of
an exception, for a server could choose its questions so that these tell it records (docs/privacy.md). The sentence with
the details stands in the client's own log and on its screen. A word that is no code of this list counts as no reason.
"""

from enum import StrEnum


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


class ReasonCode(StrEnum):
    """A word that a client may send instead of an answer."""

    POLICY = "policy"
    EGRESS = "egress"
    PRIVACY = "privacy"
    BUDGET = "budget"
    LEDGER = "ledger"
    MASKING = "masking"
    MASKED = "masked"
    MESSAGE = "message"
    SETTINGS = "settings"
    DATA = "data"
    MODEL = "model"
    DIVERGED = "diverged"
    MEMORY = "memory"
    DISK = "disk"
    CRASHED = "crashed"
    FAILED = "failed"
    ERROR = "error"

    @property
    def kind(self) -> FailureKind:
        """The kind of the failure, for metrics."""
        return _MEANINGS[self][0]

    @property
    def sentence(self) -> str:
        """What the server's operator is told."""
        return _MEANINGS[self][1]


SEE = "; its own log says more"  # which the client's operator can read, and the server cannot
_MEANINGS = {
    ReasonCode.POLICY: (
        FailureKind.PRIVACY,
        f"its own policy does not allow what the server asked for: ask for less, or agree on it with its operator{SEE}",
    ),
    ReasonCode.EGRESS: (
        FailureKind.PRIVACY,
        f"its answer held more than may leave it, or something else, and was kept back{SEE}",
    ),
    ReasonCode.PRIVACY: (
        FailureKind.PRIVACY,
        f"the differential privacy of this job is not to be had there{SEE}",
    ),
    ReasonCode.BUDGET: (
        FailureKind.PRIVACY,
        f"its privacy budget is spent: it takes no part until its operator allows more{SEE}",
    ),
    ReasonCode.LEDGER: (
        FailureKind.PRIVACY,
        f"its privacy ledger is not what it left, or is of other data; its operator has to put it in order{SEE}",
    ),
    ReasonCode.MASKING: (
        FailureKind.SECURE,
        f"it stopped secure aggregation, as going on might have shown its update; the next round begins anew{SEE}",
    ),
    ReasonCode.MASKED: (
        FailureKind.MASKED,
        "it has masked an update of this round before, and a second sum could give that away; the round is skipped",
    ),
    ReasonCode.MESSAGE: (
        FailureKind.DAMAGED,
        f"the server's message was damaged on its way, or is not one that a client of its version takes{SEE}",
    ),
    ReasonCode.SETTINGS: (
        FailureKind.ERROR,
        f"the run's settings and its own do not go together{SEE}",
    ),
    ReasonCode.DATA: (
        FailureKind.ERROR,
        f"its data cannot be used for this{SEE}",
    ),
    ReasonCode.MODEL: (
        FailureKind.ERROR,
        f"its base model cannot be loaded, or cannot take this adapter{SEE}",
    ),
    ReasonCode.DIVERGED: (
        FailureKind.DIVERGED,
        "its loss or its adapter was no longer finite; a lower train.lr may help",
    ),
    ReasonCode.MEMORY: (
        FailureKind.MEMORY,
        "it has too little memory for this; a smaller train.batch_size or model.max_length may help",
    ),
    ReasonCode.DISK: (
        FailureKind.DISK,
        f"its disk is full or cannot be written{SEE}",
    ),
    ReasonCode.CRASHED: (
        FailureKind.CRASHED,
        f"its worker ended in the middle of this, or did not come back{SEE}",
    ),
    ReasonCode.FAILED: (
        FailureKind.ERROR,
        f"it could not do this job{SEE}",
    ),
    ReasonCode.ERROR: (
        FailureKind.ERROR,
        f"an error that nobody foresaw ended its work{SEE}",
    ),
}
