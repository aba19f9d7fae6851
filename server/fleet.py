"""A Fleet on Flower's Grid: the same for its simulation and its deployment."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from threading import Event
from typing import Any, Concatenate, ParamSpec, TypeGuard, TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import Failure, FailureKind, RoundFailed, WireError
from fedlora.jobs import Client, Job, SecAggStep, Update
from fedlora.messages import codec, envelope
from fedlora.messages.envelope import RawMessage, unpack
from fedlora.messages.parts import Parts, PartTracker, payload
from fedlora.metrics import Metrics
from fedlora.server import upload_checks
from fedlora.server.aggregation import Answers
from fedlora.server.replies import Pause, ReplyInbox, read_error
from fedlora.storage.event_log import EventLog

SECURE = f"{MessageType.QUERY}.secure"
LAST_RETURN = 30.0  # seconds that the others have to be back, once there are enough
MOST_INTRODUCTIONS = 3  # how often a node is asked who it is, one time after another
NEXT_INTRODUCTION = 60.0  # seconds after which it is asked again all the same: its owner may have mended what was wrong
log = logging.getLogger("fedlora")
T = TypeVar("T", Update, Metrics)
X = TypeVar("X")
P = ParamSpec("P")
Read = Callable[[RawMessage, Job], T | codec.MissingParts]


@dataclass(frozen=True)
class FleetRules:
    """The rules by which a fleet admits clients and waits for them."""

    clients: int  # how many the run is to have
    quorum: float = 1.0  # share of them without which it does not begin
    wait: float = 0.0  # seconds for those beyond the quorum
    deadline: float = 0.0  # seconds after which a round's missing clients have failed; 0: wait for all
    needed: float = 0.0  # share of a round's clients without which those that are away are waited for
    largest_step: float = inf  # norm of an update above which it is refused
    run: str = ""  # name of the run, by which clients keep their state
    nodes: Mapping[int, int] | None = None  # node -> the client whose key the node has; None: nodes are believed
    ranks: Sequence[int] = ()  # of each client; none: clients are believed
    settings: Mapping[str, int | float | str | bool] = field(default_factory=dict)  # settings that clients go by
    base: str = ""  # fingerprint of the base model that all must have; none: not compared
    patient: bool = False  # wait for clients that cannot say who they are until they can; else give up


class FlowerFleet:
    """The clients of a run on the nodes of Flower's Grid."""

    def __init__(
        self,
        grid: Grid,
        rules: FleetRules,
        answered: Callable[[int], None] = lambda _: None,
        waiting: Callable[[Mapping[int, float]], None] = lambda _: None,
        stop: Event | None = None,
    ) -> None:
        """`answered` is told of every answer; `waiting`, about once a second, who is waited for, and how long.

        `stop`, once set, raises `KeyboardInterrupt` from whatever waits.
        """
        self.traffic = PartTracker()
        self.event_log = EventLog(None)
        self.online: Callable[[int], None] = lambda _: None  # told how many are connected, at every look
        self._grid, self._rules, self._answered, self._waiting = grid, rules, answered, waiting
        self._stop, self._inbox = stop or Event(), ReplyInbox(grid)
        self._registry = NodeRegistry(grid, rules, self._inbox, self._note_joined)
        self._begun, self._enough_since = False, inf

    def clients(self) -> Sequence[Client]:
        """All clients known, once there are enough to begin; those that joined meanwhile too.

        Raises `RoundFailed` where nodes that cannot say who they are leave too few.
        """
        pause, began = Pause(self._stop), time.monotonic()
        least = max(1, ceil(self._rules.quorum * self._rules.clients))
        while True:
            online = set(self._grid.get_node_ids())
            self.online(len(online))
            has_news = self._registry.meet(online)
            if self._may_begin(least):
                return [client for _, client in sorted(self._registry.clients.items())]
            if not self._rules.patient:
                self._registry.give_up_if_too_few(online, least)
            self._waiting(dict.fromkeys(self._registry.missing(), time.monotonic() - began))
            pause(has_news)

    def _may_begin(self, least: int) -> bool:
        """Are all clients there, or have enough been there for as long as the rules say? Once true, it stays so."""
        known = len(self._registry.clients)
        self._enough_since = min(self._enough_since, time.monotonic()) if known >= least else inf
        waited = time.monotonic() - self._enough_since >= self._rules.wait
        self._begun = self._begun or waited or known >= self._rules.clients
        return self._begun

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job on its client's node, handing over each answer as it arrives.

        A client that cannot be reached has failed, unless too few are left without it: then it is waited for.
        """
        most = max(map(upload_checks.most_bytes, jobs.values()), default=0)
        began, left, short = time.monotonic(), jobs, max(1, ceil(self._rules.needed * len(jobs)))
        away: dict[int, Failure] = {}
        while left:
            away = {}
            for i, answer in self._carry(MessageType.TRAIN, left, self._read_update, most):
                if _is_offline(answer):
                    away[i] = answer
                    continue
                short -= isinstance(answer, Update)
                yield i, answer
            left = {i: jobs[i] for i in away} if self._rules.needed and self._are_back(away, short, began) else {}
        yield from away.items()

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have every client take its step of secure aggregation, and return the answers."""
        waiting = self._push(SECURE, asks, lambda i: codec.pack_secagg_step(asks[i]))
        silent = Failure("no answer to secure aggregation", FailureKind.LATE)
        said: dict[int, Mapping[str, str] | Failure] = dict.fromkeys(asks, silent)
        for i, reply in self._replies(waiting, 0):
            said[i] = read_reply(reply, self._rules.run, upload_checks.read_secagg_reply)
        return said

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The metrics of every job's model on its client's held-out examples."""
        return dict(self._carry(MessageType.EVALUATE, jobs, upload_checks.read_metrics, upload_checks.MOST_METRICS))

    def _carry(self, kind: str, jobs: Mapping[int, Job], read: Read[T], most: int) -> Iterator[tuple[int, T | Failure]]:
        """Send every job in a message; yield each answer, of at most `most` bytes of numbers, as it comes.

        A client that lost its parts is sent its job again, once, in full.
        """
        messages = JobMessages(kind, jobs, self.traffic, self.event_log)
        waiting = self._push(kind, jobs, messages.write)
        silent = {i: self._silence(i in waiting.values()) for i in jobs}
        for i, reply in self._replies(waiting, most):
            answer = read_reply(reply, self._rules.run, read, jobs[i])
            if isinstance(answer, codec.MissingParts) and messages.may_repeat(i):
                waiting |= self._push(kind, [i], messages.write)
                continue
            del silent[i]
            yield i, self._taken(kind, i, jobs[i], answer)
        for i, failure in silent.items():
            self.traffic.held.pop(i, None)  # whether it has what was sent, nobody knows
            self._note(kind, i, jobs[i], failure)
            yield i, failure

    def _silence(self, was_sent: bool) -> Failure:
        """The failure of a client that gives no answer."""
        if was_sent:
            return Failure(f"no answer after {self._rules.deadline:g} s", FailureKind.LATE)
        return Failure("offline: its node is not there", FailureKind.OFFLINE)

    def _taken(self, kind: str, i: int, job: Job, answer: T | codec.MissingParts | Failure) -> T | Failure:
        """Count an answer after which its client is not asked again, and write it in the log; return it."""
        if isinstance(answer, codec.MissingParts):
            reason = f"it still lacks {len(answer.lacks)} parts of a job that was sent in full"
            answer = Failure(reason, FailureKind.REFUSED)
        if isinstance(answer, Update):
            self.traffic.receive(answer)
        self._note(kind, i, job, answer)
        if kind == MessageType.TRAIN and not _is_offline(answer):
            self._answered(i)
        return answer

    def _are_back(self, away: Mapping[int, Failure], short: int, began: float) -> bool:
        """Wait until as many of these clients are back as the round is short of.

        False where the round is short of none, or of more than these, or its time is up.
        """
        pause, since, enough_since = Pause(self._stop), time.monotonic(), inf
        while 0 < short <= len(away) and not self._is_late(began):
            gone, now = self._offline(away), time.monotonic()
            enough_since = min(enough_since, now) if len(away) - len(gone) >= short else inf
            if not gone or now - enough_since > LAST_RETURN:
                return True
            self._waiting(dict.fromkeys(gone, now - since))
            pause(False)
        return False

    def _offline(self, clients: Iterable[int]) -> list[int]:
        online = set(self._grid.get_node_ids())
        return [i for i in sorted(clients) if self._registry.nodes[i] not in online]

    def _is_late(self, began: float) -> bool:
        return bool(self._rules.deadline) and time.monotonic() - began > self._rules.deadline

    def _read_update(self, message: RawMessage, job: Job) -> Update | codec.MissingParts:
        return upload_checks.validated_update(message, job, self._rules.largest_step)

    def _note(self, kind: str, i: int, job: Job, answer: Update | Metrics | Failure) -> None:
        """Write in the server's log what came in, or did not."""
        entry: dict[str, Any] = {"what": kind, "client": i, "round": job.round + 1}
        if isinstance(answer, Failure):
            event = "refused" if answer.kind == FailureKind.REFUSED else "failed"
            self.event_log.write(event, **entry, reason=answer.reason)
        elif isinstance(answer, Update):
            tensors, nbytes = payload(answer)
            self.event_log.write("received", **entry, bytes=nbytes, tensors=tensors)
        else:
            self.event_log.write("received", **entry)

    def _note_joined(self, client: Client) -> None:
        self.event_log.write("joined", client=client.id, examples=client.examples, rank=client.rank)

    def _push(self, kind: str, clients: Iterable[int], content: Callable[[int], RecordDict]) -> dict[str, int]:
        """Send those of the clients that are online their messages; return which message went to which client."""
        online, nodes = set(self._grid.get_node_ids()), self._registry.nodes
        contents = {nodes[i]: content(i) for i in clients if nodes[i] in online}
        ttl = self._rules.deadline or None  # what nobody waits for any more is not begun
        client_on = {node: i for i, node in nodes.items()}
        sent = push(self._grid, self._rules.run, kind, contents, ttl)
        return {id: client_on[node] for id, node in sent.items()}

    def _replies(self, waiting: dict[str, int], most: int) -> Iterator[tuple[int, Message | Failure]]:
        """Yield clients with their replies, each as soon as it is there, until none is left or time is up."""
        began, pause = time.monotonic(), Pause(self._stop)
        while waiting and not self._is_late(began):
            replies = self._inbox.look_at(waiting, most)
            for id, reply in replies:
                yield waiting.pop(id), reply
            self._waiting(dict.fromkeys(sorted(waiting.values()), time.monotonic() - began))
            if waiting:
                pause(bool(replies))
        self._inbox.forget(waiting)


class JobMessages:
    """The messages that bring clients their jobs, each with the parts that its client does not hold."""

    def __init__(self, kind: str, jobs: Mapping[int, Job], traffic: PartTracker, event_log: EventLog) -> None:
        self._kind, self._jobs, self._traffic, self._event_log = kind, jobs, traffic, event_log
        self._parts, self._encoder = Parts(), codec.JobEncoder()
        self._repeated = set[int]()

    def write(self, client: int) -> RecordDict:
        """The message for this client; its parts count as sent from then on."""
        job = self._jobs[client]
        parts = self._parts.of(job)
        missing = self._traffic.send(client, parts)
        nbytes = sum(part.nbytes for part in missing.values())
        entry: dict[str, Any] = {"what": self._kind, "client": client, "round": job.round + 1}
        self._event_log.write("sent", **entry, bytes=nbytes, parts=list(missing))
        return self._encoder.job(job, parts, missing)

    def may_repeat(self, client: int) -> bool:
        """May the client be sent its job in full? Once it may: from then on it counts as holding nothing."""
        if client in self._repeated:
            return False
        self._repeated.add(client)
        self._traffic.held.pop(client, None)
        return True


class NodeRegistry:
    """Which node is which client: every new node is asked, and believed as far as the rules allow."""

    def __init__(self, grid: Grid, rules: FleetRules, inbox: ReplyInbox, joined: Callable[[Client], None]) -> None:
        self.clients: dict[int, Client] = {}
        self.nodes: dict[int, int] = {}  # client -> node
        self._grid, self._rules, self._inbox, self._joined = grid, rules, inbox, joined
        self._asked: dict[str, int] = {}  # message -> the node that was asked who it is
        self._tries: Counter[int] = Counter()
        self._tried: dict[int, float] = {}  # node -> when it was asked last
        self._wrong: dict[int, str] = {}  # node -> why it could not say

    def meet(self, online: set[int]) -> bool:
        """Ask nodes that are new who they are, and take down the answers to earlier questions; was there any?"""
        self._asked = {id: n for id, n in self._asked.items() if n in online}  # who left is asked anew when it is back
        self._ask(online - set(self.nodes.values()) - set(self._asked.values()))
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
        hellos = {node: codec.pack_join_request(self._rules.settings) for node in due}
        self._asked |= push(self._grid, self._rules.run, MessageType.QUERY, hellos)

    def _take_down(self, node: int, reply: Message | Failure) -> None:
        """Take down who a node is, or why it cannot say."""
        said = read_reply(reply, self._rules.run, upload_checks.read_client)
        why = said.reason if isinstance(said, Failure) else _wrong_about(self._rules, node, *said)
        if why or isinstance(said, Failure):
            self._tries[node] += 1
            self._wrong[node] = why
            log.warning("a client could not say who it is: %s", why)
        elif self._is_elsewhere(said[0], node):
            self._tries[node] = MOST_INTRODUCTIONS
            self._wrong[node] = f"two nodes have partition-id {said[0].id}"
            log.warning("client %d is on another node already; its second one is left out", said[0].id)
        else:
            self.clients[said[0].id], self.nodes[said[0].id] = said[0], node
            self._joined(said[0])

    def _is_elsewhere(self, client: Client, node: int) -> bool:
        """Is the client on another node that is online?"""
        other = self.nodes.get(client.id)
        return other not in (None, node) and other in set(self._grid.get_node_ids())


def push(
    grid: Grid, run: str, kind: str, contents: Mapping[int, RecordDict], ttl: float | None = None
) -> dict[str, int]:
    """Send each node its message; return which message went to which node."""
    messages = [Message(envelope.stamp(content, run), node, kind, ttl=ttl) for node, content in contents.items()]
    sent = set(grid.push_messages(messages)) if messages else set()
    nodes = {m.metadata.message_id: node for m, node in zip(messages, contents, strict=True)}
    return {id: node for id, node in nodes.items() if id in sent}


def read_reply(
    reply: Message | Failure, run: str, read: Callable[Concatenate[RawMessage, P], X], *args: P.args, **kwargs: P.kwargs
) -> X | Failure:
    """What `read` makes of a reply, or the failure: the reply is an error, of another run, or refused by `read`."""
    if isinstance(reply, Failure):
        return reply
    if reply.has_error():
        return read_error(reply.error)
    try:
        message = unpack(reply.content)
        if message.run != run:
            raise WireError(f"an answer is of run {message.run!r}; this is {run!r}")
        return read(message, *args, **kwargs)
    except WireError as e:
        return Failure(str(e), FailureKind.REFUSED)


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


def _is_offline(answer: object) -> TypeGuard[Failure]:
    """Could the client not be reached? Then it may be asked again."""
    return isinstance(answer, Failure) and answer.kind == FailureKind.OFFLINE
