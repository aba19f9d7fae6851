"""Replies of clients: waiting for them, receiving them one by one, and reading those that are errors."""

import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import replace
from threading import Event, Thread
from typing import Concatenate, ParamSpec, TypeVar

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedlora.errors import Failure, FailureKind, WireError
from fedlora.messages.envelope import RawMessage, printable, unpack
from fedlora.server.fleet_rules import FleetRules
from fedlora.server.memory_bounds import bounded
from fedlora.server.refusals import failure_of

P = ParamSpec("P")
X = TypeVar("X")

KIND_OF_CODE = {  # Flower's codes of errors that no client's work raised
    3: FailureKind.LATE,  # the message expired
    4: FailureKind.LATE,  # the reply expired
    5: FailureKind.OFFLINE,  # the node's heartbeats have ended
    8: FailureKind.CRASHED,  # the process of the ClientApp ended
}
SAID_BY_CODE = {  # what is shown for these: their text can come from a client
    3: "the job expired before it was begun",
    4: "the answer expired before it was sent",
    5: "offline: its heartbeats have ended",
    8: "a process of it ended in the middle of this",
}
GLANCE = 2.0  # seconds that a reply is waited for while it is brought in; then the others have their turn


class Pause:
    """A wait between two looks for replies: short while replies come, longer and longer while none does."""

    def __init__(self, stop: Event, shortest: float = 0.05, longest: float = 1.0) -> None:
        self._stop, self._shortest, self._longest, self._now = stop, shortest, longest, shortest

    def __call__(self, some: bool) -> None:
        """Wait. Raises `KeyboardInterrupt` once `stop` is set."""
        self._now = self._shortest if some else min(2 * self._now, self._longest)
        if self._stop.wait(self._now):
            raise KeyboardInterrupt


class ReplyInbox:
    """Pulls each reply on its own, in a thread.

    Flower's `pull_messages` decodes every message it is given, so one malformed upload would fail them all; and it
    blocks until all announced chunks of a message have come, which a stalled client can drag out for an hour. A reply
    is matched to the message that it answers, because the sender named in it is chosen by the client.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._coming: dict[str, Future[list[Message]]] = {}  # by the message that they answer

    def look(self, id: str, most: float) -> Message | Failure | None:
        """The reply to a message; None while it is not all there. More than `most` bytes of numbers are refused."""
        known = self._coming.pop(id, None)
        coming = known or self._bring(id, most)
        if not wait([coming], 0 if known else GLANCE).done:
            self._coming[id] = coming
            return None
        return failure_of(lambda: _reply_to(id, coming.result()))

    def look_at(self, ids: Iterable[str], most: float) -> list[tuple[str, Message | Failure]]:
        """The replies that are there, each with the id of the message that it answers."""
        looks = ((id, self.look(id, most)) for id in ids)
        return [(id, reply) for id, reply in looks if reply is not None]

    def forget(self, ids: Iterable[str]) -> None:
        """Stop waiting for the replies to these messages."""
        for id in ids:
            self._coming.pop(id, None)

    def _bring(self, id: str, most: float) -> Future[list[Message]]:
        """Start to receive the reply to a message, in a thread that does not outlive this process."""
        coming = Future[list[Message]]()

        def bring() -> None:
            try:
                with bounded(most):
                    coming.set_result(list(self._grid.pull_messages([id])))
            except Exception as e:  # whatever it is, `look` says it
                coming.set_exception(e)

        Thread(target=bring, daemon=True).start()
        return coming


def _reply_to(id: str, replies: list[Message]) -> Message | Failure | None:
    """The reply to this message; the SuperLink's own error replies name no node, but the message they answer."""
    for reply in replies:
        if reply.metadata.reply_to_message_id == id:
            return reply
    if replies:
        return Failure("an answer says that it is to another message", FailureKind.REFUSED)
    return None


def read_reply(
    reply: Message | Failure,
    rules: FleetRules,
    read: Callable[Concatenate[RawMessage, P], X],
    *args: P.args,
    **kwargs: P.kwargs,
) -> X | Failure:
    """What `read` makes of a reply, or the failure: the reply is an error, of another run, or refused by `read`."""
    if isinstance(reply, Failure):
        return reply

    def content() -> X | Failure:
        if reply.has_error():
            return read_error(reply.error, tells_all=rules.tells_all)
        message = unpack(reply.content)
        if message.run != rules.run:
            raise WireError(f"an answer is of run {message.run!r}; this is {rules.run!r}")
        return read(message, *args, **kwargs)

    answer = failure_of(content)
    return _naming_nobody(answer) if isinstance(answer, Failure) else answer


def _naming_nobody(failure: Failure) -> Failure:
    """The failure with no `client N` in its words, which may be the client's own: the screen puts a name for that."""
    return replace(failure, reason=re.sub(r"\bclient(?=\s+\d)", "client no.", failure.reason))


def read_error(error: Error, *, tells_all: bool = False) -> Failure:
    """The failure that an error reply tells of, in this program's own words, from its code or the client's.

    `tells_all`: of a simulation on this machine, whose sentences may be shown as they are.
    """
    if tells_all:
        line = _one_line(error)
        return Failure(line, KIND_OF_CODE[error.code]) if error.code in KIND_OF_CODE else Failure.parse(line)
    if kind := KIND_OF_CODE.get(error.code):
        return Failure(SAID_BY_CODE[error.code], kind)
    return Failure.told(error.reason or "")


def _one_line(error: Error) -> str:
    """The text of an error reply without what Flower and Ray add: exceptions come in their class or in tracebacks."""
    text = printable(error.reason or "", "\n")
    if wrapped := re.fullmatch(r"<class '(?:.*\.)?(\w+)[^']*'>:<'(.*)'>", text, re.DOTALL):
        text = f"{wrapped[1]}: {wrapped[2]}"
    lines = list(filter(None, map(str.strip, text.splitlines()))) or [f"Flower's error {error.code}"]
    return lines[-1] if any(map(_is_of_a_traceback, lines)) else lines[0]


def _is_of_a_traceback(line: str) -> bool:
    return "Traceback" in line or line.startswith(("ray::", "File "))
