"""The fleet on Flower's Grid: order, deadlines, lost parts, nodes that cannot say who they are."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from uuid import uuid4

import pytest
import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo  # type: ignore[attr-defined]
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedlora.client.part_cache import PartStore
from fedlora.errors import Failure, FailureKind, RoundFailed
from fedlora.jobs import SecAggStep, shared_start
from fedlora.message_types import MissingParts
from fedlora.messages import codec
from fedlora.messages.envelope import unpack
from fedlora.server.fleet import FleetRules, FlowerFleet
from fedlora.server.replies import KIND_OF_CODE, read_error
from fedlora.strategy import Client, Job, Update
from tests.support.adapters import factors


class Threads(Grid):
    """Flower's Grid over ClientApps in threads of this process: quick, and as slow or broken as a test wants."""

    def __init__(self, *apps: ClientApp) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self._apps = {100 + i: app for i, app in enumerate(apps)}
        self._pool, self._replies = ThreadPoolExecutor(8), dict[str, Future[Message]]()
        self.activated: dict[int, str] = {}  # node -> when it was started

    def get_node_ids(self) -> Iterable[int]:
        return list(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for m in messages:
            m.metadata.__dict__["_message_id"] = str(uuid4())
            self._replies[m.metadata.message_id] = self._pool.submit(self._run, m)
        return [m.metadata.message_id for m in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i).result() for i in message_ids if i in self._replies and self._replies[i].done()]

    def _run(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(1, node, {"partition-id": node - 100}, RecordDict(), {})
        try:
            return self._apps[node](message, context)
        except Exception as e:
            return Message(Error(2, f"{type(e)}:<'{e}'>"), reply_to=message)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=n, last_activated_at=self.activated.get(n, "")) for n in self.get_node_ids()]

    set_run = run = create_message = send_and_receive = lambda *_, **__: None  # type: ignore[assignment]


def echo(
    tmp: Path, before: Callable[[int], None] = lambda _: None, say: int | None = None, examples: int = 1
) -> ClientApp:
    """An app that answers a job with the job's own start."""
    app = ClientApp()

    @app.query()
    def describe(message: Message, context: Context) -> Message:
        id = int(context.node_config["partition-id"]) if say is None else say
        return Message(codec.pack_client(Client(id, 10, 4)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before(int(context.node_config["partition-id"]))
        order = codec.read_job(unpack(message.content))
        parts, lacks = PartStore(tmp / str(context.node_id)).take(order)
        if lacks:
            return Message(codec.pack_missing_parts(MissingParts(lacks)), reply_to=message)
        return Message(codec.pack_update(Update(shared_start(order.job(parts)), examples, 0.5), 0), reply_to=message)

    return app


def jobs(n: int) -> dict[int, Job]:
    return {i: Job(factors(i, dtype=torch.float32)) for i in reversed(range(n))}


def test_an_answer_is_handed_over_when_it_comes(tmp_path: Path) -> None:
    told: list[int] = []
    slow = echo(tmp_path, lambda i: time.sleep(0.3 if i == 2 else 0))
    fleet = FlowerFleet(Threads(slow, slow, slow), FleetRules(3), told.append)
    assert [c.id for c in fleet.clients()] == [0, 1, 2]
    answered = [i for i, _ in fleet.train(jobs(3))]
    assert answered == told and sorted(told) == [0, 1, 2] and told[-1] == 2


def test_who_is_late_has_failed_and_the_others_have_not(tmp_path: Path) -> None:
    slow = echo(tmp_path, lambda i: time.sleep(1.5 if i == 0 else 0))
    fleet = FlowerFleet(Threads(slow, slow), FleetRules(2, deadline=0.5))
    fleet.clients()
    answers = dict(fleet.train(jobs(2)))
    assert answers[0] == Failure("no answer after 0.5 s", FailureKind.LATE) and isinstance(answers[1], Update)


def test_what_clients_do_for_their_own_use_may_take_longer_than_a_round(tmp_path: Path) -> None:
    """A model that is trained alone takes as long as all rounds; the deadline is that of one."""
    slow = echo(tmp_path, lambda i: time.sleep(1.0))
    fleet = FlowerFleet(Threads(slow, slow), FleetRules(2, deadline=0.3, grace=0.1))
    fleet.clients()
    own = {i: replace(job, stage="personal", metrics=False) for i, job in jobs(2).items()}
    assert all(isinstance(answer, Update) for answer in dict(fleet.train(own)).values())


class Hanging(Threads):
    """Client 0 announces an update, of which the rest never comes: Flower waits for it as it takes it in."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if any(r.metadata.message_type == MessageType.TRAIN and r.metadata.src_node_id == 100 for r in replies):
            time.sleep(60)
        return replies


def test_an_upload_that_hangs_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    fleet, began = FlowerFleet(Hanging(*[echo(tmp_path)] * 3), FleetRules(3, deadline=4)), time.monotonic()
    fleet.clients()
    answers = dict(fleet.train(jobs(3)))
    assert answers[0] == Failure("no answer after 4 s", FailureKind.LATE)
    assert isinstance(answers[1], Update) and isinstance(answers[2], Update)
    assert time.monotonic() - began < 10


class Outage(Threads):
    """From the first job on, nobody is there for so many looks; then all are, or all but client 0."""

    looks = 0

    def __init__(self, *apps: ClientApp, lasts: int, loses: bool = False) -> None:
        super().__init__(*apps)
        self._lasts, self._loses = lasts, loses

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        there = list(super().get_node_ids())
        if self.looks == 1:  # as they introduce themselves
            return there
        return [n for n in there if not (self._loses and n == 100)] if self.looks > self._lasts else []


def test_clients_without_whom_a_round_fails_are_waited_for_and_asked_again(tmp_path: Path) -> None:
    told = list[int]()
    grid = Outage(*[echo(tmp_path)] * 3, lasts=6)
    fleet = FlowerFleet(grid, FleetRules(3, needed=1.0), waiting=lambda who: told.append(len(who)))
    fleet.clients()
    assert all(isinstance(answer, Update) for answer in dict(fleet.train(jobs(3))).values())
    assert grid.looks > 6 and 3 in told


def test_flowers_own_errors_have_the_codes_that_are_known_here() -> None:
    from flwr.common.constant import ErrorCode  # private: the number is what travels

    late = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
    kinds = dict.fromkeys(late, FailureKind.LATE) | {ErrorCode.NODE_UNAVAILABLE: FailureKind.OFFLINE}
    assert kinds | {ErrorCode.CLIENT_APP_CRASHED: FailureKind.CRASHED} == KIND_OF_CODE


def test_a_client_that_a_round_can_do_without_is_not_waited_for(tmp_path: Path) -> None:
    fleet = FlowerFleet(Outage(*[echo(tmp_path)] * 3, lasts=1, loses=True), FleetRules(3, needed=0.5))
    fleet.clients()
    answers = dict(fleet.train(jobs(3)))
    assert answers[0] == Failure("offline: its node is not there", FailureKind.OFFLINE)
    assert isinstance(answers[1], Update) and isinstance(answers[2], Update)


def test_once_enough_are_back_the_others_have_a_moment_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.server.fleet.LAST_RETURN", 0.5)
    told = list[list[int]]()
    grid = Outage(*[echo(tmp_path)] * 3, lasts=4, loses=True)
    fleet = FlowerFleet(grid, FleetRules(3, needed=0.5), waiting=lambda who: told.append(sorted(who)))
    fleet.clients()
    answers = dict(fleet.train(jobs(3)))
    assert [0, 1, 2] in told and [0] in told
    assert answers[0] == Failure("offline: its node is not there", FailureKind.OFFLINE)
    assert isinstance(answers[1], Update) and isinstance(answers[2], Update)


def test_a_deadline_ends_the_wait_for_clients_that_stay_away(tmp_path: Path) -> None:
    fleet = FlowerFleet(Outage(*[echo(tmp_path)] * 3, lasts=10**9), FleetRules(3, needed=0.5, deadline=0.5))
    fleet.clients()
    gone = Failure("offline: its node is not there", FailureKind.OFFLINE)
    assert dict(fleet.train(jobs(3))) == dict.fromkeys(range(3), gone)


def test_stop_ends_the_waiting_at_once(tmp_path: Path) -> None:
    stop, slow = Event(), echo(tmp_path, lambda _: time.sleep(2))
    fleet = FlowerFleet(Threads(slow), FleetRules(1), stop=stop)
    fleet.clients()
    ThreadPoolExecutor().submit(lambda: (time.sleep(0.3), stop.set()))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dict(fleet.train(jobs(1)))
    assert time.monotonic() - began < 1


def test_too_few_who_can_say_who_they_are_end_the_run_with_their_reason(tmp_path: Path) -> None:
    with pytest.raises(
        RoundFailed, match="1 of 2 clients cannot say who they are: it gave no reason that is known here"
    ):
        FlowerFleet(Threads(ClientApp(), echo(tmp_path)), FleetRules(2)).clients()
    with pytest.raises(RoundFailed, match="two nodes have partition-id 7"):
        FlowerFleet(Threads(echo(tmp_path, say=7), echo(tmp_path, say=7)), FleetRules(2)).clients()


def test_a_client_that_cannot_keep_what_it_is_sent_is_asked_twice_and_no_more(tmp_path: Path) -> None:
    app, asked = echo(tmp_path), list[int]()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        asked.append(len(codec.read_job(unpack(message.content)).sent))
        return Message(codec.pack_missing_parts(MissingParts(("ab" * 32,))), reply_to=message)

    fleet = FlowerFleet(Threads(app), FleetRules(1))
    fleet.clients()
    dict(fleet.train(jobs(1)))
    lacking = Failure("it still lacks 1 parts of a job that was sent in full", FailureKind.REFUSED)
    assert fleet.evaluate(jobs(1))[0] == lacking
    assert asked == [0, 3]


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("client 1: the loss is nan", "client 1: the loss is nan"),
        ("<class 'a.b.ActorDiedError'>:<'The actor died.\n\tclass_name: X'>", "ActorDiedError: The actor died."),
        ("<class 'x.E'>:<'ray::A.run()\nTraceback (most recent call last):\n  File y\nz.E: boom'>", "z.E: boom"),
        ("Node Unavailable — it did not report", "Node Unavailable — it did not report"),
    ],
)
def test_an_error_reply_is_one_readable_line(said: str, line: str) -> None:
    assert read_error(Error(2, said), tells_all=True).reason == line


class Poisoned(Threads):
    """A grid where one message's reply cannot be unpacked, or says that it answers another client's."""

    def __init__(self, how: str, *apps: ClientApp) -> None:
        super().__init__(*apps)
        self._how, self._sent = how, list[str]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        self._sent = ids if len(ids) > 1 else self._sent
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for reply in found:
            if (
                self._how
                and reply.metadata.reply_to_message_id == self._sent[0]
                and reply.metadata.message_type == "train"
            ):
                if self._how == "unpack":
                    raise AttributeError("an object of another kind")
                reply.metadata.__dict__["_reply_to_message_id"] = self._sent[1]
        return found


@pytest.mark.parametrize(("how", "said"), [("unpack", "could not be unpacked"), ("other", "to another message")])
def test_an_answer_that_is_poisoned_or_anothers_is_its_clients_failure_alone(
    how: str, said: str, tmp_path: Path
) -> None:
    fleet = FlowerFleet(Poisoned(how, echo(tmp_path), echo(tmp_path), echo(tmp_path)), FleetRules(3))
    fleet.clients()
    answers = dict(fleet.train(dict(sorted(jobs(3).items()))))
    assert isinstance(answers[0], Failure) and answers[0].kind == FailureKind.REFUSED
    assert said in answers[0].reason
    assert isinstance(answers[1], Update) and isinstance(answers[2], Update)


def claims(examples: int, tmp: Path) -> ClientApp:
    """A client that says it has 10 examples when it joins, and so many when it answers."""
    app = echo(tmp, examples=examples)

    @app.query("secure")
    def join(message: Message, context: Context) -> Message:
        said = {"examples": str(examples), "records": str(examples), "sealing": "ab"}
        return Message(codec.pack_secagg_reply(said), reply_to=message)

    return app


@pytest.mark.parametrize(("claimed", "weighs"), [(10**12, 10), (11, 10), (10, 10), (3, 3)])
def test_a_client_weighs_no_more_than_it_said_when_it_joined(claimed: int, weighs: int, tmp_path: Path) -> None:
    fleet = FlowerFleet(Threads(claims(claimed, tmp_path)), FleetRules(1))
    fleet.clients()
    answer = dict(fleet.train(jobs(1)))[0]
    assert isinstance(answer, Update) and answer.examples == weighs
    said = fleet.ask({0: SecAggStep("join", "round 1")})[0]
    assert not isinstance(said, Failure) and said["examples"] == str(weighs)


def test_each_client_is_at_a_job_of_its_own_and_arrives_when_it_is_done(tmp_path: Path) -> None:
    slow = echo(tmp_path, lambda i: time.sleep(0.4 if i == 2 else 0))
    fleet, more = FlowerFleet(Threads(slow, slow, slow), FleetRules(3)), jobs(5)
    fleet.clients()
    fleet.begin({i: more[i] for i in (0, 2)}, {})
    came = [
        i for i, answer in fleet.arrivals(3, lambda i: {1: more[1]} if i == 0 else {}) if isinstance(answer, Update)
    ]
    assert came == [0, 1, 2] and fleet.now > 0.4
    assert not list(fleet.arrivals(1, lambda _: {}))  # nobody is at work any more


def test_who_is_late_with_a_job_of_its_own_is_given_up(tmp_path: Path) -> None:
    slow = echo(tmp_path, lambda i: time.sleep(1.5 if i == 0 else 0))
    fleet = FlowerFleet(Threads(slow, slow), FleetRules(2, deadline=0.5))
    fleet.clients()
    fleet.begin(jobs(2), {})
    answers = dict(fleet.arrivals(2, lambda _: {}))
    assert answers[0] == Failure("no answer after 0.5 s", FailureKind.LATE) and isinstance(answers[1], Update)


def test_who_is_away_loses_its_turn_to_others_and_is_waited_for_where_there_are_none(tmp_path: Path) -> None:
    grid = Leaving(*[echo(tmp_path)] * 2)
    fleet = FlowerFleet(grid, FleetRules(2))
    fleet.clients()
    grid.away = {100}
    fleet.begin(jobs(2), {})
    answers = dict(fleet.arrivals(2, lambda _: {}))
    assert not answers[0].sent and isinstance(answers[1], Update)
    fleet.begin({0: jobs(1)[0]}, {})
    grid.back_after = 4
    assert isinstance(dict(fleet.arrivals(1, lambda _: {}))[0], Update)


def test_who_is_away_loses_its_turn_to_one_whose_answer_is_there_before_the_first_look(tmp_path: Path) -> None:
    grid = Leaving(*[echo(tmp_path)] * 2)
    fleet = FlowerFleet(grid, FleetRules(2))
    fleet.clients()
    grid.away, grid.back_after = {100}, 4
    fleet.begin(jobs(2), {})
    time.sleep(0.5)
    answers = dict(fleet.arrivals(2, lambda _: {}))
    assert not answers[0].sent and isinstance(answers[1], Update)


class Leaving(Threads):
    """Some nodes are away, until so many looks at who is there."""

    away: frozenset[int] | set[int] = frozenset()
    back_after = 10**9

    def get_node_ids(self) -> Iterable[int]:
        self.back_after -= 1
        return [n for n in super().get_node_ids() if n not in self.away or self.back_after < 0]
