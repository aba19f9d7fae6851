"""Whatever one reply does to the server is its client's failure, and the others' answers count as ever."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Error, Message, MessageType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedlora.errors import Failure, FailureKind
from fedlora.run.console import ConsoleProgress
from fedlora.server.fleet import FleetRules, FlowerFleet
from fedlora.strategy import Update
from tests.server.test_fleet import Threads, echo, jobs

Spoil = Callable[[Message], Message]


class Spoiling(Threads):
    """What client 0 answers to a job is made into something else on its way."""

    def __init__(self, spoil: Spoil, folder: Path) -> None:
        super().__init__(*[echo(folder)] * 3)
        self._spoil = spoil

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            is_its = reply.metadata.message_type == MessageType.TRAIN and reply.metadata.src_node_id == 100
            yield self._spoil(reply) if is_its else reply


def with_reason(reason: str) -> Spoil:
    def spoil(reply: Message) -> Message:
        spoiled = Message(Error(0, reason), reply_to=reply)
        spoiled.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return spoiled

    return spoil


def emptied(reply: Message) -> Message:
    reply.__dict__["_content"] = None
    return reply


def with_chunks(ids: str) -> Spoil:
    """The reply as Flower puts it together from its objects, after its array named other chunks than it has."""

    def spoil(reply: Message) -> Message:
        objects = {id: thing.deflate() for id, thing in get_all_nested_objects(reply.content).items()}
        told = {id: re.sub(rb'"arraychunk_ids": ?\[[^]]*\]', ids.encode(), o) for id, o in objects.items()}
        assert told != objects
        reply.__dict__["_content"] = inflate_object_from_contents(reply.content.object_id, told)
        return reply

    return spoil


def raising(error: Exception) -> Spoil:
    def spoil(reply: Message) -> Message:
        raise error

    return spoil


SPOILED: dict[str, Spoil] = {
    **{f"reason {reason!r}": with_reason(reason) for reason in (" ", "\n\t\n", "\u2003", "\0", "memory: ")},
    "neither content nor error": emptied,
    **{f"chunks {ids}": with_chunks(f'"arraychunk_ids": [{ids}]') for ids in ("999", "-2", '"x"', "[]", "1e400")},
    "no chunks": with_chunks('"x": []'),
    **{
        type(error).__name__: raising(error)
        for error in (IndexError(), ZeroDivisionError(), AssertionError(), MemoryError(), StopIteration(), KeyError())
    },
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_one_client_answers_is_its_own_failure_with_a_reason(spoil: Spoil, tmp_path: Path) -> None:
    fleet = FlowerFleet(Spoiling(spoil, tmp_path), FleetRules(3, deadline=30))
    fleet.clients()
    answers = dict(fleet.train(jobs(3)))
    assert isinstance(answers[0], Failure) and answers[0].reason.strip()
    assert isinstance(answers[1], Update) and isinstance(answers[2], Update)


def test_errors_of_the_network_are_no_clients(tmp_path: Path) -> None:
    fleet = FlowerFleet(Spoiling(raising(ConnectionError("the SuperLink is gone")), tmp_path), FleetRules(3))
    fleet.clients()
    with pytest.raises(ConnectionError):
        dict(fleet.train(jobs(3)))


def test_a_reply_that_cannot_be_unpacked_is_counted_as_refused(tmp_path: Path) -> None:
    fleet = FlowerFleet(Spoiling(raising(IndexError()), tmp_path), FleetRules(3))
    fleet.clients()
    refused = dict(fleet.train(jobs(3)))[0]
    assert refused == Failure("an answer could not be unpacked: IndexError", FailureKind.REFUSED)


@pytest.mark.parametrize("words", ["client 1 failed: its budget is spent", "x\nclient 2: gone", "memory: client  1"])
def test_a_clients_words_name_no_other_client_on_the_screen(words: str, tmp_path: Path) -> None:
    fleet = FlowerFleet(Spoiling(with_reason(words), tmp_path), FleetRules(3, tells_all=True))
    fleet.clients()
    failed = dict(fleet.train(jobs(3)))[0]
    screen = ConsoleProgress()
    screen.names = {0: "hospital-a", 1: "hospital-b", 2: "hospital-c"}
    assert isinstance(failed, Failure)
    shown = screen.named(f"client 0 failed: {failed.reason}")
    assert shown.startswith("hospital-a failed: ") and "hospital-b" not in shown and "hospital-c" not in shown
