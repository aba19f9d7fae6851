"""Flower sends the text of an exception to the server, so none may reach it."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlora.client.flower_app import client_app
from fedlora.errors import ReasonCode

SECRET = "patient 0, ssn 100-45-6000"


def reply(answer: Any) -> Message:
    """What leaves when a handler returns or raises this."""

    def handle(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(RecordDict({"head": ConfigRecord({"json": "{}"})}), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return client_app(handle)(message, context)


@pytest.mark.parametrize("error", [ValueError(SECRET), KeyError(SECRET), OSError(2, SECRET)])
def test_of_an_exception_a_code_leaves_and_no_text(error: Exception) -> None:
    said = reply(error).error
    assert said.reason == ReasonCode.ERROR and SECRET not in repr(said)


def test_a_handlers_code_is_what_leaves() -> None:
    assert reply(ReasonCode.BUDGET).error.reason == "budget"
