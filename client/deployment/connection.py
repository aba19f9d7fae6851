"""What a client's operator is told of the connection to the server, by the log of Flower's SuperNode."""

import re
import time

from fedlora.deployment.processes import Process
from fedlora.deployment.supervisor import Restart

# What a SuperNode's log says when the server has taken its key, does not answer, and answers again:
TAKEN, SILENT, ANSWERS = "SuperNode ID:", "Connection attempt failed", "Connection successful after"
GIVES_UP = "SSL/TLS handshake error detected"  # in the log of a SuperNode, which then hangs for ever
ROUND = re.compile(r"^round (\d+) of (\d+):", re.MULTILINE)  # as the worker says it of a round that it has answered
REFUSED = ("2004", "2001")  # Flower's codes for a key that is not known, and for one that is in use
FORGETS = 70.0  # seconds after which the SuperLink takes a key again that was lost without a farewell
SHORTEST, LONGEST = 10.0, 120.0  # seconds between two tries with a key that is refused
FIRST = 60.0  # seconds of silence after which it is said again; the next time after twice as many


class ServerConnection:
    """Says when the server has taken the key, no longer answers, and answers again: once each, then ever rarer."""

    def __init__(self, name: str, server: str) -> None:
        self._name, self._server = name, server
        self.gave_up = False  # the SuperNode that was started last, after which it hangs
        self._taken = False  # by the server, since the SuperNode was started last
        self._pause = SHORTEST  # seconds before the next try with a key that was refused
        self._waited = 0.0  # seconds of such pauses, since the server took the key last
        self._round: tuple[int, int] | None = None  # the last one that was answered here, and of how many
        self._silent_since: float | None = None
        self._told = FIRST  # seconds of silence after which it is said again

    def news(self, lines: str) -> list[str]:
        """What there is to say, by the lines that are new in the SuperNode's log."""
        self.gave_up = self.gave_up or GIVES_UP in lines
        said = filter(None, map(self._about, lines.splitlines()))
        return [*said, *self._reminder()]

    def answered(self, lines: str) -> None:
        """Take down which round was answered last, by the lines that are new on the worker's screen."""
        for number, of in ROUND.findall(lines):
            self._round = int(number), int(of)

    def _about(self, line: str) -> str:
        if TAKEN in line:
            self._taken, self._pause, self._waited = True, SHORTEST, 0.0
            self._silent_since, self._round = None, None
            return f"connected: {self._server} has taken the key of {self._name}, which takes part in its runs"
        if SILENT in line and self._silent_since is None:
            self._silent_since, self._told = time.monotonic(), FIRST
            return self._lost()
        if ANSWERS in line and self._silent_since is not None:
            silent, self._silent_since = time.monotonic() - self._silent_since, None
            return f"{self._server} answers again, after {silent:.0f} s"
        return ""

    def _lost(self) -> str:
        """What it means that the server does not answer, by the last round that this client was asked for."""
        trying = f"{self._server} does not answer: "
        if not self._round:
            return f"{trying}the line is lost, or the server was ended; trying again until it does"
        number, of = self._round
        if number == of:
            return f"{trying}its run has ended, after round {number} of {of}; waiting for its next run"
        return (
            f"{trying}the line is lost, or the server was ended; round {number} of {of} was the last that this client "
            "was asked for; trying again until it does"
        )

    def _reminder(self) -> list[str]:
        """The line that the server still does not answer, when it is due."""
        silent = time.monotonic() - self._silent_since if self._silent_since is not None else 0.0
        if silent < self._told:
            return []
        self._told = 2 * silent
        return [f"{self._server} has not answered for {silent:.0f} s"]

    def ended(self, node: Process) -> Restart:
        """Why the SuperNode ended, and when it is started again: later each time that its key is refused."""
        taken, gave_up, self._taken, self.gave_up = self._taken, self.gave_up, False, False
        if gave_up:
            return Restart("it gave up on a connection that broke off", node.pause())
        words = node.log_tail(15)
        if any(f"code: {code}]" in words for code in REFUSED):
            return self._key_refused()
        if node.code:
            return Restart(f"code {node.code}", node.pause())
        if taken:
            return Restart("its session has ended: the server was started again, or takes this key no more", 1.0)
        return self._key_refused()  # with 401, at which a SuperNode ends with code 0

    def _key_refused(self) -> Restart:
        may_be_forgotten = self._waited > FORGETS  # by then a key that was merely in use is taken again
        self._pause = min(2 * self._pause, LONGEST) if may_be_forgotten else SHORTEST
        here = "" if may_be_forgotten else "was in use here less than a minute ago, "
        self._waited += self._pause
        return Restart(
            f"the server does not take this key: it {here}was removed or is not registered there, or another machine "
            "uses it now, or this machine's clock is wrong",
            self._pause,
        )
