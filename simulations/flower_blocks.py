"""Blocks of clients on the nodes of Flower's simulation: a node for each worker, and a message for all of its clients.

To the round loop every client is a node of its own (`BlockGrid`). Messages of the same kind that are sent at once
travel together, one to each worker, and the worker trains its clients in one pass (`answer_block`).
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from threading import Lock
from uuid import uuid4

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.client import handlers, training
from fedlora.client.handlers import AnswerSteps, ClientContext, PendingTraining
from fedlora.client.stacked import together
from fedlora.client.training import Outcome
from fedlora.messages.envelope import RawMessage

BLOCK = 64  # clients in a message at most: their updates are all in memory before they are sent
FIRST_NODE = 2  # of client 0; node 1 is the server's
FAILED = "failed"  # the record that says why a client has no answer
RAISED = 2  # Flower's code for an exception in a ClientApp
log = logging.getLogger("fedlora")
ClientFor = Callable[[int, RawMessage], ClientContext]


def pack(contents: Mapping[int, RecordDict | str]) -> RecordDict:
    """One content of those of many clients, each record named after its client; a text says why there is none."""
    block = RecordDict()
    for client, content in contents.items():
        records = {FAILED: ConfigRecord({"why": content})} if isinstance(content, str) else dict(content.items())
        for name, record in records.items():
            block[f"{client}.{name}"] = record
    return block


def unpack(block: RecordDict) -> dict[int, RecordDict | str]:
    """What `pack` packed, by client."""
    records: dict[int, RecordDict] = defaultdict(RecordDict)
    for label, record in block.items():
        client, _, name = label.partition(".")
        records[int(client)][name] = record
    return {i: str(own[FAILED]["why"]) if FAILED in own else own for i, own in records.items()}


def answer_block(kind: str, block: RecordDict, client_for: ClientFor, *, apart: bool = False) -> RecordDict:
    """The answers of all clients of a block; those that train do so in one pass, or with `apart` one after another.

    Private clients do so always: each holds its ledger's lock while it trains, and a second one that waits for the same
    ledger in another worker might wait for ever.
    """
    answers: dict[int, RecordDict | str] = {}
    with ExitStack() as opened:
        begun: list[tuple[int, AnswerSteps, PendingTraining]] = []
        for i, content in unpack(block).items():
            if isinstance(content, str):
                continue
            answering = handlers.answering(kind, content, partial(client_for, i), tells_all=True)
            opened.enter_context(closing(answering))
            first = training.begin(answering)
            if not isinstance(first, PendingTraining):
                answers[i] = first
            elif apart or first.task.job.privacy:
                answers[i] = training.end(answering, training.outcome_of(first.model, first.task))
            else:
                begun.append((i, answering, first))
        answers |= _ended(begun)
    return pack(answers)


def _ended(begun: list[tuple[int, AnswerSteps, PendingTraining]]) -> Iterator[tuple[int, RecordDict | str]]:
    """Train what was begun, and yield each client with its answer."""
    left = dict(enumerate(begun))
    try:
        for place, outcome in _outcomes([first for _, _, first in begun]):
            i, answering, _ = left.pop(place)
            yield i, training.end(answering, outcome)
    except Exception:  # whatever it is: it may be for one client's data alone
        log.warning("a pass over clients broke off; each that is left is trained by itself", exc_info=True)
    for i, answering, first in left.values():
        yield i, training.end(answering, training.outcome_of(first.model, first.task))


def _outcomes(begun: Sequence[PendingTraining]) -> Iterator[tuple[int, Outcome]]:
    """Train in one pass; yield the place of each with what came of it."""
    if begun:
        tasks = [first.task for first in begun]
        yield from together.perform(begun[0].model, tasks, lambda why: log.warning("%s", why))


@dataclass(frozen=True)
class ClientNode:
    """A client as a node, in the words of Flower's `NodeInfo` that are used here."""

    node_id: int
    last_activated_at: str = ""


class BlockGrid:
    """A Grid on which every client is a node, over one on which every worker is; it has what a fleet uses of a Grid."""

    def __init__(self, grid: Grid, clients: int) -> None:
        self._grid, self._clients = grid, clients
        self._lock = Lock()  # replies are pulled in threads
        self._sent: dict[str, Message] = {}  # by its id: a message to a client that is not answered
        self._block_of: dict[str, str] = {}  # that message -> the block's that carried it
        self._replies: dict[str, Message] = {}  # that message -> its reply, which has come and was not pulled

    def get_nodes(self) -> list[ClientNode]:
        """All clients, once there is a worker."""
        return [ClientNode(FIRST_NODE + i) for i in range(self._clients)] if self._workers() else []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to clients, those to the clients of one worker together; return the ids of those sent."""
        workers, blocks = self._workers(), defaultdict[tuple[int, str, int], list[Message]](list)
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            client = message.metadata.dst_node_id - FIRST_NODE
            place = client % len(workers), message.metadata.message_type, client // len(workers) // BLOCK
            blocks[place].append(message)
        return [id for (worker, *_), block in blocks.items() for id in self._push(workers[worker], block)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that have come."""
        with self._lock:
            ids = list(message_ids)
            for block in {self._block_of[id] for id in ids if id in self._block_of}:
                for reply in self._grid.pull_messages([block]):
                    self._take_apart(block, reply)
            return [self._replies.pop(id) for id in ids if id in self._replies]

    def _workers(self) -> list[int]:
        return sorted(node.node_id for node in self._grid.get_nodes())

    def _push(self, worker: int, block: list[Message]) -> list[str]:
        """Send a worker the messages to its clients in one."""
        content = pack({m.metadata.dst_node_id - FIRST_NODE: m.content for m in block})
        longest = max(m.metadata.ttl for m in block)
        message = Message(content, worker, block[0].metadata.message_type, ttl=longest)
        if not list(self._grid.push_messages([message])):
            return []
        own = {m.metadata.message_id: m for m in block}
        with self._lock:
            self._sent |= own
            self._block_of |= dict.fromkeys(own, message.metadata.message_id)
        return list(own)

    def _take_apart(self, block: str, reply: Message) -> None:
        """Keep the reply of every client of a block for when it is pulled; a worker's error is that of each."""
        contents = {} if reply.has_error() else unpack(reply.content)
        error = reply.error if reply.has_error() else Error(RAISED, "the worker left this client's message out")
        for id in [id for id, carrier in self._block_of.items() if carrier == block]:
            del self._block_of[id]
            sent = self._sent.pop(id)
            answer = contents.get(sent.metadata.dst_node_id - FIRST_NODE, error)
            told = Error(RAISED, answer) if isinstance(answer, str) else answer
            self._replies[id] = Message(told, reply_to=sent)
