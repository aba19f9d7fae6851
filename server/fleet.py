"""A Fleet on Flower's Grid: the same for its simulation and its deployment."""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import TypeVar

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.errors import RoundFailed, WireError
from fedlora.flat import Parts, Traffic
from fedlora.metrics import Metrics
from fedlora.rounds import Answers, Failure
from fedlora.strategy import Ask, Client, Job, Update

SECURE = f"{MessageType.QUERY}.secure"
TRIES = 3  # how often a node is asked who it is
log = logging.getLogger("fedlora")
T = TypeVar("T", Update, Metrics)
Read = Callable[[RecordDict, Job], T | wire.Lacks]


class FlowerFleet:
    def __init__(
        self,
        grid: Grid,
        least: int,
        answered: Callable[[int], None] = lambda _: None,
        stop: Event | None = None,
        deadline: float = 0.0,
    ) -> None:
        """`least`: clients to wait for. `stop`, once set, raises `KeyboardInterrupt` from whatever waits.

        `deadline`: seconds after which a round's missing clients have failed; 0: wait for all.
        """
        self.traffic = Traffic()
        self._grid, self._least, self._answered, self._deadline = grid, least, answered, deadline
        self._stop = stop or Event()
        self._clients: dict[int, Client] = {}
        self._nodes: dict[int, int] = {}  # client -> node
        self._asked: dict[str, int] = {}  # message -> the node that was asked who it is
        self._tries: Counter[int] = Counter()
        self._wrong: dict[int, str] = {}  # node -> why it could not say

    def clients(self) -> Sequence[Client]:
        """All clients known, once there are enough; those that joined meanwhile too.

        Raises `RoundFailed` where nodes that cannot say who they are leave too few.
        """
        pause = Pause(self._stop)
        while True:
            online = set(self._grid.get_node_ids())
            self._ask(online - set(self._nodes.values()) - set(self._asked.values()))
            replies = list(self._grid.pull_messages(list(self._asked))) if self._asked else []
            for reply in replies:
                self._know(self._asked.pop(reply.metadata.reply_to_message_id), reply)
            if len(self._clients) >= self._least:
                return [self._clients[i] for i in sorted(self._clients)]
            lost = {n: why for n, why in self._wrong.items() if self._tries[n] >= TRIES and n in online}
            if lost and len(online) - len(lost) < self._least:
                why = "; ".join(sorted(set(lost.values())))
                raise RoundFailed(f"{len(lost)} of {len(online)} clients cannot say who they are: {why}")
            pause(bool(replies))

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job on its client's node, handing over each answer as it arrives."""
        return self._carry(MessageType.TRAIN, jobs, wire.read_update)

    def ask(self, asks: Mapping[int, Ask]) -> Mapping[int, Mapping[str, str] | Failure]:
        """A step of secure aggregation by each client, and what it says."""
        waiting = self._push(SECURE, {i: wire.pack_ask(a) for i, a in asks.items()})
        said: dict[int, Mapping[str, str] | Failure] = {i: Failure("no answer to secure aggregation") for i in asks}
        for i, reply in self._replies(waiting):
            said[i] = _heard(reply)
        return said

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The model of every job on its client's held-out examples."""
        return dict(self._carry(MessageType.EVALUATE, jobs, lambda content, _: wire.read_metrics(content)))

    def _carry(self, kind: str, jobs: Mapping[int, Job], read: Read[T]) -> Iterator[tuple[int, T | Failure]]:
        """A message a job, and its answer; a client that lost its parts is sent its job again, once, in full."""
        parts, packer, again = Parts(), wire.Packer(), set[int]()

        def letter(i: int) -> RecordDict:
            whole = parts.of(jobs[i])
            return packer.job(jobs[i], whole, self.traffic.send(i, whole))

        done = set[int]()
        waiting = self._push(kind, {i: letter(i) for i in jobs})
        for i, reply in self._replies(waiting):
            answer = _open(reply, jobs[i], read)
            if isinstance(answer, wire.Lacks) and i not in again:
                again.add(i)
                self.traffic.held.pop(i, None)
                waiting |= self._push(kind, {i: letter(i)})
                continue
            if isinstance(answer, wire.Lacks):
                answer = Failure(f"it still lacks {len(answer.lacks)} parts of a job that was sent in full")
            done.add(i)
            if isinstance(answer, Update):
                self.traffic.receive(answer)
            if kind == MessageType.TRAIN:
                self._answered(i)
            yield i, answer
        late = Failure(f"no answer after {self._deadline:g} s")
        lost = Failure("its job could not be sent")
        yield from ((i, late if i in waiting.values() else lost) for i in jobs if i not in done)

    def _push(self, kind: str, contents: Mapping[int, RecordDict]) -> dict[str, int]:
        """Send; which message went to which client."""
        ttl = self._deadline or None  # what nobody waits for any more is not begun
        messages = {i: Message(c, self._nodes[i], kind, ttl=ttl) for i, c in contents.items()}
        sent = set(self._grid.push_messages(list(messages.values())))
        return {m.metadata.message_id: i for i, m in messages.items() if m.metadata.message_id in sent}

    def _replies(self, waiting: dict[str, int]) -> Iterator[tuple[int, Message]]:
        """Clients with their replies, each as soon as it is there, until none is waited for or time is up."""
        began, pause = time.monotonic(), Pause(self._stop)
        while waiting and not (self._deadline and time.monotonic() - began > self._deadline):
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:  # the SuperLink's own error replies name no node, but the message they answer
                yield waiting.pop(reply.metadata.reply_to_message_id), reply
            if waiting:
                pause(bool(replies))

    def _ask(self, nodes: set[int]) -> None:
        """Ask nodes who they are."""
        some = [n for n in sorted(nodes) if self._tries[n] < TRIES]
        if some:
            messages = [Message(RecordDict(), n, MessageType.QUERY) for n in some]
            sent = set(self._grid.push_messages(messages))
            asked = {m.metadata.message_id: n for m, n in zip(messages, some, strict=True)}
            self._asked |= {id: n for id, n in asked.items() if id in sent}

    def _know(self, node: int, reply: Message) -> None:
        """Take down who a node is, or why it cannot say."""
        try:
            if reply.has_error():
                raise WireError(reason(reply.error))
            client = wire.read_client(reply.content)
        except WireError as e:
            self._tries[node] += 1
            self._wrong[node] = str(e)
            log.warning("a client could not say who it is: %s", e)
            return
        other = self._nodes.get(client.id)
        if other not in (None, node) and other in set(self._grid.get_node_ids()):
            self._tries[node] = TRIES
            self._wrong[node] = f"two nodes have partition-id {client.id}"
            log.warning("client %d is on another node already; its second one is left out", client.id)
            return
        self._clients[client.id], self._nodes[client.id] = client, node


class Pause:
    """Waiting between two looks: short while answers come, longer while none does."""

    def __init__(self, stop: Event, shortest: float = 0.05, longest: float = 1.0) -> None:
        self._stop, self._shortest, self._longest, self._now = stop, shortest, longest, shortest

    def __call__(self, some: bool) -> None:
        """Wait. Raises `KeyboardInterrupt` once `stop` is set."""
        self._now = self._shortest if some else min(2 * self._now, self._longest)
        if self._stop.wait(self._now):
            raise KeyboardInterrupt


def _open(reply: Message, job: Job, read: Read[T]) -> T | wire.Lacks | Failure:
    if reply.has_error():
        return Failure(reason(reply.error))
    try:
        return read(reply.content, job)
    except WireError as e:
        return Failure(str(e))


def _heard(reply: Message) -> Mapping[str, str] | Failure:
    if reply.has_error():
        return Failure(reason(reply.error))
    try:
        return wire.read_said(reply.content)
    except WireError as e:
        return Failure(str(e))


def reason(error: Error) -> str:
    """What an error reply says, as one line: Flower wraps exceptions in their class and, through Ray, in tracebacks."""
    text = error.reason or f"Flower's error {error.code}"
    if wrapped := re.fullmatch(r"<class '(?:.*\.)?(\w+)[^']*'>:<'(.*)'>", text, re.DOTALL):
        text = f"{wrapped[1]}: {wrapped[2]}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any("Traceback" in line or line.startswith(("ray::", "File ")) for line in lines):
        return lines[-1]
    return lines[0]
