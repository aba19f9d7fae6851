"""A Fleet on Flower's Grid: the same for its simulation and its deployment."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from threading import Event
from typing import Any, TypeGuard, TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import Failure, FailureKind, RoundFailed, WireError
from fedlora.jobs import Client, Job, SecAggStep, Update
from fedlora.messages import codec
from fedlora.messages.parts import Parts, PartTracker, payload
from fedlora.metrics import Metrics
from fedlora.server import upload_checks
from fedlora.server.aggregation import Answers
from fedlora.server.replies import Pause, ReplyInbox, read_error
from fedlora.storage.event_log import EventLog

SECURE = f"{MessageType.QUERY}.secure"
GRACE = 30.0  # seconds that the others have to be back, once there are enough
TRIES = 3  # how often a node is asked who it is, one time after another
AGAIN = 60.0  # seconds after which it is asked again all the same: its owner may have mended what was wrong
log = logging.getLogger("fedlora")
T = TypeVar("T", Update, Metrics)
X = TypeVar("X")
Read = Callable[[RecordDict, Job], T | codec.MissingParts]


@dataclass(frozen=True)
class FleetRules:
    """What a fleet goes by."""

    clients: int  # there are to be
    quorum: float = 1.0  # share of them without which it does not begin
    wait: float = 0.0  # seconds for those beyond the quorum
    deadline: float = 0.0  # seconds after which a round's missing clients have failed; 0: wait for all
    needed: float = 0.0  # share of a round's clients without which those that are away are waited for
    largest_step: float = inf  # norm of an update above which it is refused
    run: str = ""  # by which clients keep what is theirs
    nodes: Mapping[int, int] | None = None  # node -> the client whose key it has; None: nodes are believed
    ranks: Sequence[int] = ()  # of each client; none: clients are believed
    told: Mapping[str, int | float | str | bool] = field(default_factory=dict)  # settings that clients go by
    base: str = ""  # fingerprint of the base model that all must have; none: not compared
    patient: bool = False  # wait for clients that cannot say who they are until they can; else give up


class FlowerFleet:
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
        self.journal = EventLog(None)
        self.online: Callable[[int], None] = lambda _: None  # told how many are connected, at every look
        self._grid, self._rules, self._answered, self._waiting = grid, rules, answered, waiting
        self._stop, self._inbox = stop or Event(), ReplyInbox(grid)
        self._begun = False
        self._clients: dict[int, Client] = {}
        self._nodes: dict[int, int] = {}  # client -> node
        self._asked: dict[str, int] = {}  # message -> the node that was asked who it is
        self._tries: Counter[int] = Counter()
        self._tried: dict[int, float] = {}  # node -> when it was asked last
        self._wrong: dict[int, str] = {}  # node -> why it could not say

    def clients(self) -> Sequence[Client]:
        """All clients known, once there are enough to begin; those that joined meanwhile too.

        Raises `RoundFailed` where nodes that cannot say who they are leave too few.
        """
        pause, began, since = Pause(self._stop), time.monotonic(), inf
        least = max(1, ceil(self._rules.quorum * self._rules.clients))
        while True:
            online = set(self._grid.get_node_ids())
            self.online(len(online))
            some = self._meet(online)
            since = min(since, time.monotonic()) if len(self._clients) >= least else inf
            late = time.monotonic() - since >= self._rules.wait
            if self._begun or len(self._clients) >= self._rules.clients or late:
                self._begun = True
                return [self._clients[i] for i in sorted(self._clients)]
            if not self._rules.patient:
                self._give_up_if_too_few(online, least)
            self._waiting(dict.fromkeys(self._missing(), time.monotonic() - began))
            pause(some)

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
        """A step of secure aggregation by each client, and what it says."""
        waiting = self._push(SECURE, asks, lambda i: codec.pack_ask(asks[i]))
        silent = Failure("no answer to secure aggregation", FailureKind.LATE)
        said: dict[int, Mapping[str, str] | Failure] = dict.fromkeys(asks, silent)
        for i, reply in self._replies(waiting, 0):
            said[i] = self._open(reply, upload_checks.read_said)
        return said

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The model of every job on its client's held-out examples."""
        return dict(self._carry(MessageType.EVALUATE, jobs, upload_checks.read_metrics, upload_checks.MOST_METRICS))

    def _carry(self, kind: str, jobs: Mapping[int, Job], read: Read[T], most: int) -> Iterator[tuple[int, T | Failure]]:
        """A message a job, and its answer of at most so many bytes of numbers.

        A client that lost its parts is sent its job again, once, in full.
        """
        parts, packer, again = Parts(), codec.JobEncoder(), set[int]()

        def letter(i: int) -> RecordDict:
            whole = parts.of(jobs[i])
            missing = self.traffic.send(i, whole)
            nbytes = sum(flat.nbytes for flat in missing.values())
            self.journal.write("sent", what=kind, client=i, round=jobs[i].round + 1, bytes=nbytes, parts=list(missing))
            return packer.job(jobs[i], whole, missing)

        def at(job: Job) -> Callable[[RecordDict], T | codec.MissingParts]:
            return lambda content: read(content, job)

        done = set[int]()
        waiting = self._push(kind, jobs, letter)
        offline = set(jobs) - set(waiting.values())
        for i, reply in self._replies(waiting, most):
            answer = self._open(reply, at(jobs[i]))
            if isinstance(answer, codec.MissingParts) and i not in again:
                again.add(i)
                self.traffic.held.pop(i, None)
                waiting |= self._push(kind, [i], letter)
                continue
            if isinstance(answer, codec.MissingParts):
                answer = Failure(
                    f"it still lacks {len(answer.lacks)} parts of a job that was sent in full", FailureKind.REFUSED
                )
            done.add(i)
            if isinstance(answer, Update):
                self.traffic.receive(answer)
            self._note(kind, i, jobs[i], answer)
            if kind == MessageType.TRAIN and not _is_offline(answer):
                self._answered(i)
            yield i, answer
        late = Failure(f"no answer after {self._rules.deadline:g} s", FailureKind.LATE)
        gone = Failure("offline: its node is not there", FailureKind.OFFLINE)
        for i in (i for i in jobs if i not in done):
            self.traffic.held.pop(i, None)  # whether it has what was sent, nobody knows
            self._note(kind, i, jobs[i], gone if i in offline else late)
            yield i, gone if i in offline else late

    def _are_back(self, away: Mapping[int, Failure], short: int, began: float) -> bool:
        """Wait until there are as many of them as a round is short of; false where it is not, or they are too few."""
        pause, since, enough = Pause(self._stop), time.monotonic(), inf
        while 0 < short <= len(away) and not self._is_late(began):
            online, now = set(self._grid.get_node_ids()), time.monotonic()
            gone = [i for i in sorted(away) if self._nodes[i] not in online]
            enough = min(enough, now) if len(away) - len(gone) >= short else inf
            if not gone or now - enough > GRACE:
                return True
            self._waiting(dict.fromkeys(gone, now - since))
            pause(False)
        return False

    def _is_late(self, began: float) -> bool:
        return bool(self._rules.deadline) and time.monotonic() - began > self._rules.deadline

    def _read_update(self, content: RecordDict, job: Job) -> Update | codec.MissingParts:
        return upload_checks.validated_update(content, job, self._rules.largest_step)

    def _note(self, kind: str, i: int, job: Job, answer: Update | Metrics | Failure) -> None:
        """The server's log of what came in, or did not."""
        told: dict[str, Any] = {"what": kind, "client": i, "round": job.round + 1}
        if isinstance(answer, Failure):
            event = "refused" if answer.kind == FailureKind.REFUSED else "failed"
            self.journal.write(event, **told, reason=answer.reason)
        elif isinstance(answer, Update):
            tensors, nbytes = payload(answer)
            self.journal.write("received", **told, bytes=nbytes, tensors=tensors)
        else:
            self.journal.write("received", **told)

    def _push(self, kind: str, clients: Iterable[int], letter: Callable[[int], RecordDict]) -> dict[str, int]:
        """Write to whoever of them is online; which message went to which client."""
        ttl = self._rules.deadline or None  # what nobody waits for any more is not begun
        online = set(self._grid.get_node_ids())
        there = [i for i in clients if self._nodes[i] in online]
        messages = {i: Message(codec.stamp(letter(i), self._rules.run), self._nodes[i], kind, ttl=ttl) for i in there}
        sent = set(self._grid.push_messages(list(messages.values())))
        return {m.metadata.message_id: i for i, m in messages.items() if m.metadata.message_id in sent}

    def _replies(self, waiting: dict[str, int], most: int) -> Iterator[tuple[int, Message | Failure]]:
        """Clients with their replies, each as soon as it is there, until none is waited for or time is up."""
        began, pause = time.monotonic(), Pause(self._stop)
        while waiting and not self._is_late(began):
            replies = self._inbox.look_at(waiting, most)
            for id, reply in replies:
                yield waiting.pop(id), reply
            self._waiting(dict.fromkeys(sorted(waiting.values()), time.monotonic() - began))
            if waiting:
                pause(bool(replies))
        self._inbox.forget(waiting)

    def _open(self, reply: Message | Failure, read: Callable[[RecordDict], X]) -> X | Failure:
        """What a reply says, if it is one, of this run, and passes the checks."""
        if isinstance(reply, Failure):
            return reply
        if reply.has_error():
            return read_error(reply.error)
        try:
            if (run := codec.run_of(reply.content)) != self._rules.run:
                raise WireError(f"an answer is of run {run!r}; this is {self._rules.run!r}")
            return read(reply.content)
        except WireError as e:
            return Failure(str(e), FailureKind.REFUSED)

    def _meet(self, online: set[int]) -> bool:
        """Ask nodes that are new who they are, and take down what those say that were asked; did any?"""
        self._asked = {id: n for id, n in self._asked.items() if n in online}  # who left is asked anew when it is back
        self._ask(online - set(self._nodes.values()) - set(self._asked.values()))
        replies = self._inbox.look_at(self._asked, most=0)
        for id, reply in replies:
            self._know(self._asked.pop(id), reply)
        return bool(replies)

    def _missing(self) -> list[int]:
        ids = self._rules.nodes.values() if self._rules.nodes else range(self._rules.clients)
        return sorted(set(ids) - set(self._clients))

    def _give_up_if_too_few(self, online: set[int], least: int) -> None:
        lost = {n: why for n, why in self._wrong.items() if self._tries[n] >= TRIES and n in online}
        if lost and len(online) - len(lost) < least:
            why = "; ".join(sorted(set(lost.values())))
            raise RoundFailed(f"{len(lost)} of {len(online)} clients cannot say who they are: {why}")

    def _ask(self, nodes: set[int]) -> None:
        """Ask nodes who they are."""
        now = time.monotonic()
        some = [n for n in sorted(nodes) if self._tries[n] < TRIES or now - self._tried.get(n, 0.0) > AGAIN]
        if some:
            self._tried |= dict.fromkeys(some, now)
            hello = codec.pack_hello(self._rules.told)
            messages = [Message(codec.stamp(hello, self._rules.run), n, MessageType.QUERY) for n in some]
            sent = set(self._grid.push_messages(messages))
            asked = {m.metadata.message_id: n for m, n in zip(messages, some, strict=True)}
            self._asked |= {id: n for id, n in asked.items() if id in sent}

    def _know(self, node: int, reply: Message | Failure) -> None:
        """Take down who a node is, or why it cannot say."""
        said = self._open(reply, upload_checks.read_client)
        why = said.reason if isinstance(said, Failure) else self._wrong_about(node, *said)
        if why or isinstance(said, Failure):
            self._tries[node] += 1
            self._wrong[node] = why
            log.warning("a client could not say who it is: %s", why)
            return
        client = said[0]
        other = self._nodes.get(client.id)
        if other not in (None, node) and other in set(self._grid.get_node_ids()):
            self._tries[node] = TRIES
            self._wrong[node] = f"two nodes have partition-id {client.id}"
            log.warning("client %d is on another node already; its second one is left out", client.id)
            return
        self._clients[client.id], self._nodes[client.id] = client, node
        self.journal.write("joined", client=client.id, examples=client.examples, rank=client.rank)

    def _wrong_about(self, node: int, client: Client, base: str) -> str:
        """What a client may not say of itself; empty where all is well."""
        rules = self._rules
        if rules.nodes is not None and rules.nodes.get(node) != client.id:
            return f"the node with the key of client {rules.nodes.get(node, 'nobody')} says that it is {client.id}"
        if rules.ranks and not (client.id < len(rules.ranks) and client.rank == rules.ranks[client.id]):
            return f"client {client.id} says its rank is {client.rank}; the run has {len(rules.ranks)} clients' ranks"
        if rules.base and base and base != rules.base:
            return (
                f"client {client.id} has another base model ({base[:12]}, the server's is {rules.base[:12]}); give it "
                "the same files"
            )
        return ""


def _is_offline(answer: object) -> TypeGuard[Failure]:
    """Could the client not be reached? Then it may be asked again."""
    return isinstance(answer, Failure) and answer.kind == FailureKind.OFFLINE
