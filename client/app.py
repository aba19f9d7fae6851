"""The Flower ClientApp: a worker behind three messages. Knows no algorithm."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora import config as configuration
from fedlora import wire, worker
from fedlora.client.parts import PartStore
from fedlora.config import Config
from fedlora.errors import ClientFailed, FedloraError
from fedlora.run import Setup, own, prepare
from fedlora.site import Desk
from fedlora.store import Store
from fedlora.strategy import Job

RAISED = 2  # Flower's code for an exception in a ClientApp
log = logging.getLogger("fedlora")
_ready: dict[str, Setup] = {}  # by config: a process loads the model once, and serves any client with it


@dataclass(frozen=True, eq=False)
class Place:
    """One client's place at this process's model."""

    setup: Setup
    desk: Desk
    parts: PartStore  # what it need not be sent again

    def job(self, content: RecordDict) -> Job | wire.Lacks:
        """The job of a message, or what is lacking for it."""
        order = wire.read_order(content)
        parts, lacks = self.parts.take(order)
        return wire.Lacks(lacks) if lacks else order.job(parts)


def build(config: Config | None = None, folder: Path | None = None) -> ClientApp:
    """An app that serves any client of a run and keeps their files in `folder`.

    Without a config it is read from Flower's run config; without a folder it is the node's `state-dir`.
    """
    app = ClientApp()
    kinds = app.query(), app.query("secure"), app.train(), app.evaluate()
    for register, work in zip(kinds, (describe, take_step, train, evaluate), strict=True):
        register(partial(_serve, work, config, folder))
    return app


def describe(place: Place, content: RecordDict) -> RecordDict:
    """Who this client is."""
    desk = place.desk
    return wire.pack_client(desk.site.client(desk.id, place.setup.ranks[desk.id]))


def take_step(place: Place, content: RecordDict) -> RecordDict:
    """A step of secure aggregation."""
    return wire.pack_said(place.desk.reply(wire.read_ask(content)))


def train(place: Place, content: RecordDict) -> RecordDict:
    """One round's work."""
    job = place.job(content)
    if isinstance(job, wire.Lacks):
        return wire.pack_lacks(job)
    return wire.pack_update(place.desk.answer(place.setup.model, job))


def evaluate(place: Place, content: RecordDict) -> RecordDict:
    """The model that this client would use, on its held-out examples."""
    job = place.job(content)
    if isinstance(job, wire.Lacks):
        return wire.pack_lacks(job)
    kept = Store(place.desk.folder).before(job.round + 1)
    return wire.pack_metrics(worker.evaluate(place.setup.model, job, place.desk.site.heldout, kept))


def _serve(
    work: Callable[[Place, RecordDict], RecordDict],
    config: Config | None,
    folder: Path | None,
    message: Message,
    context: Context,
) -> Message:
    """Do the work; what goes wrong in it is the reply, in a sentence that reaches the server's log."""
    try:
        return Message(work(_place(config, folder, context), message.content), reply_to=message)
    except Exception as e:
        log.warning("%s failed", work.__name__, exc_info=True)
        reason = str(e) if isinstance(e, FedloraError) else f"{type(e).__name__}: {e}"
        return Message(Error(RAISED, reason), reply_to=message)


def _place(config: Config | None, folder: Path | None, context: Context) -> Place:
    if config is None:
        config = configuration.build(dict(context.run_config))
    if folder is None:
        folder = Path(str(context.node_config.get("state-dir", "runs/clients"))) / str(context.run_id)
    setup = _setup(config)
    id = int(context.node_config.get("partition-id", -1))
    if not 0 <= id < len(setup.sites):
        raise ClientFailed(f"this node's partition-id is {id}; the data has clients 0 to {len(setup.sites) - 1}")
    desk = Desk(id, setup.sites[id], folder / str(id), own(setup.config))
    return Place(setup, desk, PartStore(desk.folder))


def _setup(config: Config) -> Setup:
    key = repr(config)
    if key not in _ready:
        _ready.clear()
        _ready[key] = prepare(config)
    return _ready[key]


app = build()
