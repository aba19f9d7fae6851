"""The generic Flower ClientApp: it answers each kind of message by one handler."""

import logging
from collections.abc import Callable
from functools import partial

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.reasons import ReasonCode

log = logging.getLogger("fedlora")
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
    """Do the work; what goes wrong in it is the reply, as a failure that reaches the server's log.

    An exception may not reach Flower, which would send its text to the server.
    """
    try:
        answer = handle(kind, message.content, context)
    except Exception:
        log.warning("a message could not be handled", exc_info=True)
        answer = ReasonCode.ERROR
    return Message(Error(RAISED, str(answer)) if isinstance(answer, str) else answer, reply_to=message)
