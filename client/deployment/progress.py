"""Ends a worker whose work stands still: a job that hangs would keep every later one waiting, for ever."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

from torch import nn

STALLED = 3  # exit code of a worker whose job stood still; the supervisor, which loads no torch, repeats it


class ProgressWatch:
    """Watches whether the work on a message goes on; every forward pass of the model is a sign that it does."""

    def __init__(self, longest: float, stalled: Callable[[str], None]) -> None:
        """Call `stalled` with what stands still after `longest` seconds without a sign of progress; 0: never."""
        self._longest, self._stalled = longest, stalled
        self._working_on = ""  # what the message asks for; empty between messages
        self._seen = 0.0  # when there was a sign of progress last, by time.monotonic()

    def sign(self, *_: object) -> None:
        """Take down that the work goes on."""
        self._seen = time.monotonic()

    def follow(self, net: nn.Module) -> None:
        """Take every forward pass of this model for a sign."""
        net.register_forward_pre_hook(self.sign)

    @contextmanager
    def working_on(self, what: str) -> Iterator[None]:
        """Watch what is done inside this `with`."""
        self.sign()
        self._working_on = what
        try:
            yield
        finally:
            self._working_on = ""

    def start(self) -> None:
        """Look about once a second, in a thread that does not outlive this process."""
        if self._longest:
            Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, self._longest / 4))
            what = self._working_on
            if what and time.monotonic() - self._seen > self._longest:
                self._stalled(what)
                return
