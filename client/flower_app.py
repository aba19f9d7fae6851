"""The generic Flower ClientApp: it answers each kind of message by one handler."""

from collections.abc import Callable
from functools import partial

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

RAISED = 2  # Flower's code for an exception in a ClientApp
Handler = Callable[[str, RecordDict, Context], RecordDict | str]  # the answer, or why there is none


def client_app(handle: Handler) -> ClientApp:
    """A ClientApp whose messages `handle` answers."""
    app = ClientApp()
    kinds = {"who": app.query(), "secure": app.query("secure"), "train": app.train(), "evaluate": app.evaluate()}
    for kind, register in kinds.items():
        register(partial(_serve, handle, kind))
    return app


def _serve(handle: Handler, kind: str, message: Message, context: Context) -> Message:
    """Do the work; what goes wrong in it is the reply, as a failure that reaches the server's log."""
    answer = handle(kind, message.content, context)
    return Message(Error(RAISED, answer) if isinstance(answer, str) else answer, reply_to=message)
