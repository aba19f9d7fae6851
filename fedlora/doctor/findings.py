"""What was found of one thing at a site."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from fedlora.errors import FedloraError

Verdict = Literal["ok", "warning", "wrong", "not asked"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and where it is not well what to do."""

    what: str
    verdict: Verdict
    said: str

    def line(self) -> str:
        """The finding for people."""
        return f"{self.verdict:9} {self.what:9} {self.said}"


def ok(what: str, said: str) -> Finding:
    """What is as it should be."""
    return Finding(what, "ok", said)


def warning(what: str, said: str) -> Finding:
    """What a run may do with, and should not have to."""
    return Finding(what, "warning", said)


def wrong(what: str, said: str) -> Finding:
    """What keeps this site from taking part."""
    return Finding(what, "wrong", said)


def not_asked(what: str, said: str) -> Finding:
    """What nothing was given to look at for."""
    return Finding(what, "not asked", said)


def found(what: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings, and what could not be done at all as one that is wrong, in its own sentence."""
    try:
        yield from findings
    except FedloraError as e:
        yield wrong(what, str(e))
    except (OSError, RuntimeError, ImportError) as e:  # of a library, whatever this machine lacks
        yield wrong(what, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
