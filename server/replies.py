"""Waiting for replies, taking them in, and what an error reply says."""

import re
from collections.abc import Iterable
from concurrent.futures import Future, wait
from threading import Event, Thread

from flwr.app import Error, Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedlora.envelope import brief
from fedlora.errors import WireError
from fedlora.rounds import Failure
from fedlora.server.inflate import bounded

POISON = AttributeError, DecodeError, KeyError, RecursionError, TypeError, ValueError  # of content, not of the network

GLANCE = 2.0  # seconds that a reply is waited for while it is brought in; then the others have their turn


class Pause:
    """Waiting between two looks: short while answers come, longer while none does."""

    def __init__(self, stop: Event, shortest: float = 0.05, longest: float = 1.0) -> None:
        self._stop, self._shortest, self._longest, self._now = stop, shortest, longest, shortest

    def __call__(self, some: bool) -> None:
        """Wait. Raises `KeyboardInterrupt` once `stop` is set."""
        self._now = self._shortest if some else min(2 * self._now, self._longest)
        if self._stop.wait(self._now):
            raise KeyboardInterrupt


class Inbox:
    """Replies, one at a time, and by our own record of what was asked.

    Flower unpacks uploads as it pulls: one that cannot be unpacked would take others with it. It waits for all that was
    announced, for more than an hour: one that hangs would keep others waiting. And whose answer it is, the client says.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._coming: dict[str, Future[list[Message]]] = {}  # by the message that they answer

    def look(self, id: str, most: float) -> Message | Failure | None:
        """The reply to a message, once all of it is there; of more than `most` bytes of numbers it is none."""
        known = self._coming.pop(id, None)
        coming = known or self._bring(id, most)
        if not wait([coming], 0 if known else GLANCE).done:
            self._coming[id] = coming
            return None
        try:
            replies = coming.result()
        except WireError as e:
            return Failure(str(e), refused=True)
        except POISON as e:
            return Failure(f"an answer could not be unpacked: {type(e).__name__}", refused=True)
        for reply in replies:  # the SuperLink's own error replies name no node, but the message they answer
            if reply.metadata.reply_to_message_id == id:
                return reply
        return Failure("an answer says that it is to another message", refused=True) if replies else None

    def look_at(self, ids: Iterable[str], most: float) -> list[tuple[str, Message | Failure]]:
        """Those replies that are there, by the messages that they answer."""
        looks = ((id, self.look(id, most)) for id in ids)
        return [(id, reply) for id, reply in looks if reply is not None]

    def forget(self, ids: Iterable[str]) -> None:
        """Of these, nobody waits for a reply any more."""
        for id in ids:
            self._coming.pop(id, None)

    def _bring(self, id: str, most: float) -> Future[list[Message]]:
        """In a thread that dies with this process."""
        coming = Future[list[Message]]()

        def bring() -> None:
            try:
                with bounded(most):
                    coming.set_result(list(self._grid.pull_messages([id])))
            except Exception as e:  # whatever it is, `look` says it
                coming.set_exception(e)

        Thread(target=bring, daemon=True).start()
        return coming


def reason(error: Error) -> str:
    """What an error reply says, as one line: Flower wraps exceptions in their class and, through Ray, in tracebacks."""
    text = brief(error.reason or f"Flower's error {error.code}", "\n")
    if wrapped := re.fullmatch(r"<class '(?:.*\.)?(\w+)[^']*'>:<'(.*)'>", text, re.DOTALL):
        text = f"{wrapped[1]}: {wrapped[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("Traceback" in line or line.startswith(("ray::", "File ")) for line in lines):
        return lines[-1]
    return lines[0]
