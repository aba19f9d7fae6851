"""The Flower ClientApp: it hands each message to a worker, and knows no algorithm.

Flower starts a new process for every message. Where a warm worker runs beside the SuperNode (`fedlora client` starts
one and names its socket in the node's config), this process loads neither torch nor a model. In a simulation, and
where Flower's own commands start the app, the worker is this process.
"""

import logging
from pathlib import Path

from flwr.app import Context, RecordDict

from fedlora.client.flower_app import build
from fedlora.errors import Failure

log = logging.getLogger("fedlora")


def _do(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
    worker, told = context.node_config.get("worker"), context.node_config.get("cold")
    if told:
        from fedlora.client.deployment.worker import cold  # slow, as that is asked for: fedlora client --cold

        return cold(Path(str(told)), kind, content)
    if not worker:
        from fedlora.client.in_process import do  # slow: it loads torch

        return do(kind, content, context)
    from fedlora.client.deployment.relay import WorkerGone, ask

    deadline = float(context.run_config.get("deadline", 0)) or None
    try:
        return ask(f"unix:{worker}", kind, content, deadline)
    except WorkerGone as e:
        return Failure.because_of(e).dumps()
    except RuntimeError as e:
        return str(e)  # a failure as the worker wrote it


app = build(_do)
