"""The Flower ClientApp: it hands each message to a worker, and knows no algorithm.

Flower starts a new process for every message. Where a warm worker runs beside the SuperNode (`fedlora client` starts
one and names its socket in the node's config), this process loads neither torch nor a model. In a simulation, and
where Flower's own commands start the app, the worker is this process.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.errors import Failure

RAISED = 2  # Flower's code for an exception in a ClientApp
Do = Callable[[str, RecordDict, Context], RecordDict | str]  # the answer, or why there is none
log = logging.getLogger("fedlora")


def build(do: Do) -> ClientApp:
    """An app whose messages `do` answers."""
    app = ClientApp()
    kinds = {"who": app.query(), "secure": app.query("secure"), "train": app.train(), "evaluate": app.evaluate()}
    for kind, register in kinds.items():
        register(partial(_serve, do, kind))
    return app


def _serve(do: Do, kind: str, message: Message, context: Context) -> Message:
    """Do the work; what goes wrong in it is the reply, as a failure that reaches the server's log."""
    answer = do(kind, message.content, context)
    return Message(Error(RAISED, answer) if isinstance(answer, str) else answer, reply_to=message)


def _do(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
    worker, told = context.node_config.get("worker"), context.node_config.get("cold")
    if told:
        from fedlora.client.service import cold  # slow, as that is asked for: fedlora client --cold

        return cold(Path(str(told)), kind, content)
    if not worker:
        from fedlora.client.local import do  # slow: it loads torch

        return do(kind, content, context)
    from fedlora.client.relay import WorkerGone, ask

    deadline = float(context.run_config.get("deadline", 0)) or None
    try:
        return ask(f"unix:{worker}", kind, content, deadline)
    except WorkerGone as e:
        return Failure.because_of(e).dumps()
    except RuntimeError as e:
        return str(e)  # a failure as the worker wrote it


app = build(_do)
