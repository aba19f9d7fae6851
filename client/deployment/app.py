"""The Flower ClientApp, which hands each message to a worker and knows no algorithm.

Flower starts a new process for every message. Where a warm worker runs beside the SuperNode (`fedlora client` starts
one and names its socket in the node's config), that process loads neither torch nor a model. In a simulation, and
where Flower's own commands start the app, the process does the work itself.
"""

import logging
from pathlib import Path

from flwr.app import Context, RecordDict

from fedlora.client.flower_app import client_app

log = logging.getLogger("fedlora")


def _answer(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
    """The answer to a message, or the code of why there is none."""
    worker, identity = context.node_config.get("worker"), context.node_config.get("cold")
    if identity:
        from fedlora.client.deployment.worker import answer_once  # slow, as `fedlora client --cold` asks for

        return answer_once(Path(str(identity)), kind, content)
    if worker:
        deadline = float(context.run_config.get("deadline", 0)) or None
        return _ask_worker(f"unix:{worker}", kind, content, deadline)
    from fedlora.client.in_process import handle  # slow: it loads torch

    return handle(kind, content, context)


def _ask_worker(address: str, kind: str, content: RecordDict, deadline: float | None) -> RecordDict | str:
    from fedlora.client.deployment.relay import WorkerFailed, WorkerGone, ask

    try:
        return ask(address, kind, content, deadline)
    except WorkerGone as e:
        log.warning("%s", e)
        return e.code
    except WorkerFailed as e:  # it has said more in its own log
        return e.code


app = client_app(_answer)
