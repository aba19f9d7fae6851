"""Which node is which client: nodes are asked who they are, and believed as far as the rules allow."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import Failure, RoundFailed
from fedlora.jobs import Client
from fedlora.messages import codec, envelope
from fedlora.server import upload_checks
from fedlora.server.fleet_rules import FleetRules
from fedlora.server.replies import ReplyInbox, read_reply

MOST_INTRODUCTIONS = 3  # how often a node is asked who it is, one time after another
NEXT_INTRODUCTION = 60.0  # seconds after which it is asked again all the same: its owner may have mended what was wrong
log = logging.getLogger("fedlora")


class NodeRegistry:
    """Which node is which client: every new node is asked, and believed as far as the rules allow."""

    def __init__(self, grid: Grid, rules: FleetRules, inbox: ReplyInbox, joined: Callable[[Client], None]) -> None:
        self.clients: dict[int, Client] = {}
        self.nodes: dict[int, int] = {}  # client -> node
        self._grid, self._rules, self._inbox, self._joined = grid, rules, inbox, joined
        self._asked: dict[str, int] = {}  # message -> the node that was asked who it is
        self._activated: dict[int, str] = {}  # node -> when it was started, as of that message
        self._tries: Counter[int] = Counter()
        self._tried: dict[int, float] = {}  # node -> when it was asked last
        self._wrong: dict[int, str] = {}  # node -> why it could not say

    def meet(self, online: Mapping[int, str]) -> bool:
        """Ask nodes that are new who they are, and take down the answers to earlier questions; was there any?

        `online` says of every node that is there when it was started. One that left is asked anew when it is back.
        """
        self._asked = {id: n for id, n in self._asked.items() if online.get(n) == self._activated[n]}
        self._activated = dict(online)
        self._ask(online.keys() - set(self.nodes.values()) - set(self._asked.values()))
        replies = self._inbox.look_at(self._asked, most=0)
        for id, reply in replies:
            self._take_down(self._asked.pop(id), reply)
        return bool(replies)

    def missing(self) -> list[int]:
        """The clients that have not joined."""
        ids = self._rules.nodes.values() if self._rules.nodes else range(self._rules.clients)
        return sorted(set(ids) - set(self.clients))

    def give_up_if_too_few(self, online: set[int], least: int) -> None:
        """Raise `RoundFailed` where the nodes that could not say who they are leave fewer than `least`."""
        lost = [node for node in online & self._wrong.keys() if self._tries[node] >= MOST_INTRODUCTIONS]
        if lost and len(online) - len(lost) < least:
            why = "; ".join(sorted({self._wrong[node] for node in lost}))
            raise RoundFailed(f"{len(lost)} of {len(online)} clients cannot say who they are: {why}")

    def _ask(self, nodes: set[int]) -> None:
        """Ask nodes who they are."""
        now = time.monotonic()
        due = [
            n
            for n in sorted(nodes)
            if self._tries[n] < MOST_INTRODUCTIONS or now - self._tried.get(n, 0.0) > NEXT_INTRODUCTION
        ]
        self._tried |= dict.fromkeys(due, now)
        hellos = {node: codec.pack_join_request(self._rules.agreement) for node in due}
        self._asked |= push(self._grid, self._rules.run, MessageType.QUERY, hellos)

    def _take_down(self, node: int, reply: Message | Failure) -> None:
        """Take down who a node is, or why it cannot say."""
        said = read_reply(reply, self._rules, upload_checks.read_client)
        why = said.reason if isinstance(said, Failure) else _wrong_about(self._rules, node, *said)
        if why or isinstance(said, Failure):
            self._tries[node] += 1
            self._wrong[node] = why
            log.warning("%s could not join: %s", self._who(node), why)
        elif self._is_elsewhere(said[0], node):
            self._tries[node] = MOST_INTRODUCTIONS
            self._wrong[node] = f"two nodes have partition-id {said[0].id}"
            log.warning("client %d is on another node already; its second one is left out", said[0].id)
        else:
            self.clients[said[0].id], self.nodes[said[0].id] = said[0], node
            self._joined(said[0])

    def _who(self, node: int) -> str:
        """The client whose key the node has, in the word for which the screen has a name."""
        return f"client {self._rules.nodes[node]}" if self._rules.nodes and node in self._rules.nodes else "a client"

    def _is_elsewhere(self, client: Client, node: int) -> bool:
        """Is the client on another node that is online?"""
        other = self.nodes.get(client.id)
        return other not in (None, node) and other in activations(self._grid)


def activations(grid: Grid) -> dict[int, str]:
    """The nodes that are online, each with when it was started, as Flower writes it.

    The time changes when a node comes back, even one that was away too briefly to be seen as offline.
    """
    return {int(node.node_id): str(node.last_activated_at) for node in grid.get_nodes()}


def push(
    grid: Grid, run: str, kind: str, contents: Mapping[int, RecordDict], ttl: float | None = None
) -> dict[str, int]:
    """Send each node its message; return which message went to which node."""
    messages = [Message(envelope.stamp(content, run), node, kind, ttl=ttl) for node, content in contents.items()]
    sent = set(grid.push_messages(messages)) if messages else set()
    nodes = {m.metadata.message_id: node for m, node in zip(messages, contents, strict=True)}
    return {id: node for id, node in nodes.items() if id in sent}


def _wrong_about(rules: FleetRules, node: int, client: Client, base: str) -> str:
    """What contradicts the rules in a client's description of itself; empty where nothing does."""
    return _wrong_key(rules, node, client) or _wrong_rank(rules, client) or _wrong_base(rules, client, base)


def _wrong_key(rules: FleetRules, node: int, client: Client) -> str:
    if rules.nodes is None or rules.nodes.get(node) == client.id:
        return ""
    return f"the node with the key of client {rules.nodes.get(node, 'nobody')} says that it is {client.id}"


def _wrong_rank(rules: FleetRules, client: Client) -> str:
    if not rules.ranks or [*rules.ranks[client.id : client.id + 1]] == [client.rank]:
        return ""
    return f"client {client.id} says its rank is {client.rank}; the run has {len(rules.ranks)} clients' ranks"


def _wrong_base(rules: FleetRules, client: Client, base: str) -> str:
    if not rules.base or base in ("", rules.base):
        return ""
    return (
        f"client {client.id} has another base model ({base[:12]}, the server's is {rules.base[:12]}); give it the same "
        "files"
    )
