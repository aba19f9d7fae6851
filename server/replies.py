"""Waiting for replies, and what an error reply says."""

import re
from threading import Event

from flwr.app import Error
from google.protobuf.message import DecodeError

from fedlora.envelope import brief

POISON = AttributeError, DecodeError, KeyError, RecursionError, TypeError, ValueError  # of content, not of the network


class Pause:
    """Waiting between two looks: short while answers come, longer while none does."""

    def __init__(self, stop: Event, shortest: float = 0.05, longest: float = 1.0) -> None:
        self._stop, self._shortest, self._longest, self._now = stop, shortest, longest, shortest

    def __call__(self, some: bool) -> None:
        """Wait. Raises `KeyboardInterrupt` once `stop` is set."""
        self._now = self._shortest if some else min(2 * self._now, self._longest)
        if self._stop.wait(self._now):
            raise KeyboardInterrupt


def reason(error: Error) -> str:
    """What an error reply says, as one line: Flower wraps exceptions in their class and, through Ray, in tracebacks."""
    text = brief(error.reason or f"Flower's error {error.code}", "\n")
    if wrapped := re.fullmatch(r"<class '(?:.*\.)?(\w+)[^']*'>:<'(.*)'>", text, re.DOTALL):
        text = f"{wrapped[1]}: {wrapped[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("Traceback" in line or line.startswith(("ray::", "File ")) for line in lines):
        return lines[-1]
    return lines[0]
