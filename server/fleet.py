"""A Fleet on Flower's Grid: the same for its simulation and its deployment."""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from threading import Event
from typing import Any, TypeGuard, TypeVar

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora.errors import Failure, FailureKind
from fedlora.jobs import Client, Job, SecAggStep, Update
from fedlora.message_types import MissingParts
from fedlora.messages import codec
from fedlora.messages.envelope import RawMessage
from fedlora.messages.parts import PartTracker, payload
from fedlora.metrics import Metrics
from fedlora.server import upload_checks
from fedlora.server.aggregation import Answers
from fedlora.server.fleet_rules import FOREVER, AnswerClock, AnswerTimes
from fedlora.server.fleet_rules import FleetRules as FleetRules
from fedlora.server.node_registry import NodeRegistry, activations, push
from fedlora.server.outbox import JobMessages, Outbox
from fedlora.server.replies import Pause, ReplyInbox, read_reply
from fedlora.storage.event_log import EventLog

SECURE = f"{MessageType.QUERY}.secure"
LAST_RETURN = 30.0  # seconds that the others have to be back, once there are enough
LOOK_AT_NODES = 5.0  # seconds between two looks for nodes that were started anew while they had a message
log = logging.getLogger("fedlora")
T = TypeVar("T", Update, Metrics)
Read = Callable[[RawMessage, int, Job], T | MissingParts]
ABSENT = Failure("offline: its node is not there", FailureKind.OFFLINE, sent=False)


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
        self.joined: Callable[[Client], None] = lambda _: None  # told of each client that has said who it is
        self.begins_without: Callable[[Sequence[int]], None] = lambda _: None  # told once who is missing at the start
        self._grid, self._rules, self._answered, self._waiting = grid, rules, answered, waiting
        self._stop, self._inbox = stop or Event(), ReplyInbox(grid)
        self._registry = NodeRegistry(grid, rules, self._inbox, self._note_joined)
        self._times = defaultdict[str, AnswerTimes](AnswerTimes)  # kind of message -> how long its answers took
        self._begun, self._enough_since = False, inf
        self._zero = time.monotonic()
        self._in_flight: dict[int, CarriedJob] = {}  # client -> the job that it is at, where each has its own
        self._ready = deque[tuple[int, Update | Failure]]()  # their answers that were not handed over yet
        self._streaming = Outbox(MessageType.TRAIN, lambda i: self._in_flight[i].messages.write(i), rules.longest)

    @property
    def _agreed(self) -> str:
        """The hash of the agreement by which clients are bound; none where nothing was agreed, as in a simulation."""
        return self._rules.agreement.hash if self._rules.agreement.settings else ""

    def clients(self) -> Sequence[Client]:
        """All clients known, once there are enough to begin; those that joined meanwhile too.

        Raises `RoundFailed` where nodes that cannot say who they are leave too few.
        """
        pause, began = Pause(self._stop), time.monotonic()
        least = max(1, ceil(self._rules.quorum * self._rules.clients))
        while True:
            online = activations(self._grid)
            self.online(len(online))
            has_news = self._registry.meet(online)
            if self._may_begin(least):
                return [client for _, client in sorted(self._registry.clients.items())]
            if not self._rules.patient:
                self._registry.give_up_if_too_few(set(online), least)
            self._waiting(dict.fromkeys(self._registry.missing(), time.monotonic() - began))
            pause(has_news)

    def _may_begin(self, least: int) -> bool:
        """Are all clients there, or have enough been there for as long as the rules say? Once true, it stays so."""
        known = len(self._registry.clients)
        self._enough_since = min(self._enough_since, time.monotonic()) if known >= least else inf
        waited = time.monotonic() - self._enough_since >= self._rules.wait
        if not self._begun and (waited or known >= self._rules.clients):
            self._begun = True
            self.begins_without(self._registry.missing())
        return self._begun

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        """Run every job on its client's node, handing over each answer as it arrives.

        A client that cannot be reached has failed, unless too few are left without it: then it is waited for.
        """
        most = max(map(upload_checks.most_bytes, jobs.values()), default=0)
        began, left, short = time.monotonic(), jobs, max(1, ceil(self._rules.needed * len(jobs)))
        away: dict[int, Failure] = {}
        sent, answered = set[int](), 0
        while left:
            clock = AnswerClock(self._rules_for(jobs), self._times[_work(jobs)], len(jobs), answered)
            away = {}
            for i, answer in self._carry(MessageType.TRAIN, left, self._read_update, most, clock):
                if _is_offline(answer):
                    sent |= {i} if answer.sent else set()
                    away[i] = replace(answer, sent=i in sent)
                    continue
                short -= isinstance(answer, Update)
                answered += isinstance(answer, Update)
                yield i, answer
            left = {i: jobs[i] for i in away} if self._rules.needed and self._are_back(away, short, began) else {}
        yield from away.items()

    def _rules_for(self, jobs: Mapping[int, Job]) -> FleetRules:
        """The rules of a round; what clients do for their own use may take longer than one, and has no deadline."""
        if all(job.stage == "round" for job in jobs.values()):
            return self._rules
        return replace(self._rules, deadline=0.0, grace=inf)

    @property
    def now(self) -> float:
        """Seconds since the run began, without those in which no server ran."""
        return time.monotonic() - self._zero

    @now.setter
    def now(self, seconds: float) -> None:
        self._zero = time.monotonic() - seconds

    def begin(self, jobs: Mapping[int, Job], began: Mapping[int, float]) -> None:
        """Send clients that are at none a job each; those whose nodes are not there are sent it later, or fail.

        How long a client has it for is counted from now, however long it had it from an earlier process.
        """
        messages = JobMessages(MessageType.TRAIN, jobs, self.traffic, self.event_log, self._agreed)
        self._in_flight |= {i: CarriedJob(job, messages, time.monotonic()) for i, job in jobs.items()}
        self._push(self._streaming, jobs)

    def arrivals(self, count: int, refill: Callable[[int], Mapping[int, Job]]) -> Answers:
        """Yield the next `count` answers, fewer where nobody is at work any more.

        After each but the last, `refill` is called with the client that has answered, and what it returns is begun.
        """
        pause, looked = Pause(self._stop), time.monotonic()
        while count and (self._ready or self._in_flight):
            if not self._ready:
                self._look_for_arrivals()
                pause(bool(self._ready))
            if self._ready:
                i, answer = self._ready.popleft()
                count -= 1
                if count:
                    self.begin(refill(i), {})
                yield i, answer
            if time.monotonic() - looked > LOOK_AT_NODES:
                self._send_again(self._streaming)
                looked = time.monotonic()

    def _look_for_arrivals(self) -> None:
        """Take in the answers that have come, and give up clients that are away or late."""
        outbox, in_flight = self._streaming, self._in_flight
        asked = set(outbox.waiting.values())  # those too whose answer is there by now: who is away has lost its turn
        most = max((upload_checks.most_bytes(at.job) for at in in_flight.values()), default=0)
        for id, reply in self._inbox.look_at(outbox.waiting, most):
            if id in outbox.waiting:
                self._inbox.forget(outbox.forget(i := outbox.waiting[id]))
                self._take_arrival(i, read_reply(reply, self._rules, self._read_update, i, in_flight[i].job))
        self._give_up_or_wait(asked)
        self._waiting({i: time.monotonic() - at.since for i, at in sorted(in_flight.items())})

    def _give_up_or_wait(self, asked: set[int]) -> None:
        """End the jobs of clients that are away or late; where all are away, they are waited for."""
        longest = self._rules.longest
        late = [i for i, at in self._in_flight.items() if time.monotonic() - at.since > longest]
        for i in late:
            self._end(i, Failure(f"no answer after {longest:g} s", FailureKind.LATE))
        away = [i for i in self._in_flight if i not in asked]
        for i in away if asked else ():
            self._end(i, self._in_flight[i].gone)
        if not asked:
            self._push(self._streaming, away)

    def _take_arrival(self, i: int, answer: Update | MissingParts | Failure) -> None:
        """Hold a client's answer ready; one that lost its parts, or went away, is to be sent its job again."""
        at = self._in_flight[i]
        if isinstance(answer, MissingParts) and at.messages.may_repeat(i):
            self._push(self._streaming, [i])
        elif _is_offline(answer):
            self._in_flight[i] = replace(at, gone=answer)
        else:
            del self._in_flight[i]
            self._ready.append((i, self._taken(MessageType.TRAIN, i, at.job, answer)))

    def _end(self, i: int, failure: Failure) -> None:
        """Give a client's job up."""
        at = self._in_flight.pop(i)
        self._inbox.forget(self._streaming.forget(i))
        self.traffic.held.pop(i, None)  # whether it has what was sent, nobody knows
        self._note(MessageType.TRAIN, i, at.job, failure)
        self._ready.append((i, failure))

    def ask(self, asks: Mapping[int, SecAggStep]) -> Mapping[int, Mapping[str, str] | Failure]:
        """Have every client take its step of secure aggregation, and return the answers."""
        kinds = {ask.step for ask in asks.values()}  # one, as all take the same step
        clock = AnswerClock(self._rules, self._times[f"{SECURE} {kinds}"], len(asks))
        bound = {i: replace(ask, agreement=self._agreed) for i, ask in asks.items()}
        outbox = Outbox(SECURE, lambda i: codec.pack_secagg_step(bound[i]), self._rules.longest)
        self._push(outbox, asks)
        silent = Failure("no answer to secure aggregation", FailureKind.LATE)
        said: dict[int, Mapping[str, str] | Failure] = dict.fromkeys(asks, silent)
        for i, reply in self._replies(outbox, 0, clock):
            said[i] = answer = read_reply(reply, self._rules, self._read_step, asks[i], i)
            if not isinstance(answer, Failure):
                clock.answered()
        return said

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        """The metrics of every job's model on its client's held-out examples."""
        clock = AnswerClock(self._rules, self._times[MessageType.EVALUATE], len(jobs))
        most = upload_checks.MOST_METRICS
        return dict(self._carry(MessageType.EVALUATE, jobs, self._read_metrics, most, clock))

    def _carry(
        self, kind: str, jobs: Mapping[int, Job], read: Read[T], most: int, clock: AnswerClock
    ) -> Iterator[tuple[int, T | Failure]]:
        """Send every job in a message; yield each answer, of at most `most` bytes of numbers, as it comes.

        A client that lost its parts is sent its job again, once, in full.
        """
        messages = JobMessages(kind, jobs, self.traffic, self.event_log, self._agreed)
        outbox = Outbox(kind, messages.write, clock.longest)
        self._push(outbox, jobs)
        silent = {i: i in outbox.waiting.values() for i in jobs}  # client -> was it sent its job?
        for i, reply in self._replies(outbox, most, clock):
            answer = read_reply(reply, self._rules, read, i, jobs[i])
            if isinstance(answer, MissingParts) and messages.may_repeat(i):
                self._push(outbox, [i])
                continue
            del silent[i]
            taken = self._taken(kind, i, jobs[i], answer)
            if not isinstance(taken, Failure):
                clock.answered()
            yield i, taken
        for i, was_sent in silent.items():
            self.traffic.held.pop(i, None)  # whether it has what was sent, nobody knows
            failure = _silence(clock) if was_sent else ABSENT
            self._note(kind, i, jobs[i], failure)
            yield i, failure

    def _taken(self, kind: str, i: int, job: Job, answer: T | MissingParts | Failure) -> T | Failure:
        """Count an answer after which its client is not asked again, and write it in the log; return it."""
        if isinstance(answer, MissingParts):
            reason = f"it still lacks {len(answer.lacks)} parts of a job that was sent in full"
            answer = Failure(reason, FailureKind.REFUSED)
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
        online = activations(self._grid)
        return [i for i in sorted(clients) if self._registry.nodes[i] not in online]

    def _is_late(self, began: float) -> bool:
        """Is the time up that the settings give a round? Where they say none, clients that are away are waited for."""
        return bool(self._rules.deadline) and time.monotonic() - began > self._rules.deadline

    def _read_update(self, message: RawMessage, i: int, job: Job) -> Update | MissingParts:
        """A client's update, of no more examples than it had when it joined, by which it weighs."""
        update = upload_checks.validated_update(message, job, self._rules.largest_step)
        if isinstance(update, MissingParts):
            return update
        self.traffic.receive(update)
        client = self._registry.clients[i]
        return replace(update, examples=min(update.examples, client.records if job.privacy else client.examples))

    def _read_metrics(self, message: RawMessage, i: int, job: Job) -> Metrics | MissingParts:
        return upload_checks.read_metrics(message, job)

    def _read_step(self, message: RawMessage, ask: SecAggStep, i: int) -> Mapping[str, str]:
        """The answer to a step; who joins has no more examples and records than when it joined the run."""
        said, client = upload_checks.read_secagg_reply(message), self._registry.clients[i]
        if ask.step != "join":
            return said
        agreed = {"examples": client.examples, "records": client.records}
        return {**said, **{name: str(min(int(said[name]), n)) for name, n in agreed.items()}}

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
        self.joined(client)

    def _push(self, outbox: Outbox, clients: Iterable[int]) -> None:
        """Send those of the clients that are online their messages."""
        online, nodes = activations(self._grid), self._registry.nodes
        there = [i for i in clients if nodes[i] in online]
        contents = {nodes[i]: outbox.content(i) for i in there}
        outbox.activated |= {i: online[nodes[i]] for i in there}
        client_on = {node: i for i, node in nodes.items()}
        ttl = min(outbox.longest, FOREVER)  # what nobody waits for any more is not begun
        sent = push(self._grid, self._rules.run, outbox.kind, contents, ttl)
        outbox.waiting |= {id: client_on[node] for id, node in sent.items()}

    def _replies(self, outbox: Outbox, most: int, clock: AnswerClock) -> Iterator[tuple[int, Message | Failure]]:
        """Yield clients with their replies, each as soon as it is there, until none is left or time is up."""
        pause, looked = Pause(self._stop), time.monotonic()
        while outbox.waiting and not clock.is_over():
            replies = self._inbox.look_at(outbox.waiting, most)
            for id, reply in replies:
                if id in outbox.waiting:  # else another message to this client was answered just now
                    self._inbox.forget(outbox.forget(i := outbox.waiting[id]))
                    yield i, reply
            if time.monotonic() - looked > LOOK_AT_NODES:
                self._send_again(outbox)
                looked = time.monotonic()
            self._waiting(dict.fromkeys(sorted(set(outbox.waiting.values())), clock.waited))
            if outbox.waiting:
                pause(bool(replies))
        self._inbox.forget(outbox.waiting)

    def _send_again(self, outbox: Outbox) -> None:
        """Send clients whose nodes were started anew their messages again.

        A node that is killed and back before its heartbeats are missed never counts as offline, so Flower does not
        say that the message it had taken is lost. A client whose node was away and worked on answers the first
        message or the second: it does a job once.
        """
        online, nodes = activations(self._grid), self._registry.nodes
        waiting = sorted(set(outbox.waiting.values()))
        anew = [i for i in waiting if online.get(nodes[i], outbox.activated[i]) != outbox.activated[i]]
        for i in anew:
            log.warning("client %d was started anew; its message is sent to it again", i)
        if anew:
            self._push(outbox, anew)


@dataclass(frozen=True, eq=False)
class CarriedJob:
    """A job that a client is at, in a run that is no run of rounds."""

    job: Job
    messages: JobMessages
    since: float  # by time.monotonic()
    gone: Failure = ABSENT  # why its client is not at it any more, if it is away


def _work(jobs: Mapping[int, Job]) -> str:
    """The kind of work of these jobs, by which their answers take alike: those that train nothing are soon done."""
    stages = {job.stage if job.trains else "nothing" for job in jobs.values()}
    return " ".join([MessageType.TRAIN, *sorted(stages - {"round"})])


def _silence(clock: AnswerClock) -> Failure:
    """The failure of a client that gives no answer."""
    return Failure(f"no answer after {round(clock.limit(), 1):g} s", FailureKind.LATE)


def _is_offline(answer: object) -> TypeGuard[Failure]:
    """Could the client not be reached? Then it may be asked again."""
    return isinstance(answer, Failure) and answer.kind == FailureKind.OFFLINE
