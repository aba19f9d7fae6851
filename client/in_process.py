"""A client whose worker is the ClientApp's own process: in Flower's simulation, where a process serves many clients."""

from functools import partial
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedlora import config as configuration
from fedlora.client import flower_app, handlers
from fedlora.client.part_cache import PartStore
from fedlora.client.policy import policy_of
from fedlora.client.runner import JobRunner
from fedlora.config import Config
from fedlora.errors import ClientFailed
from fedlora.messages.envelope import RawMessage
from fedlora.run.setup import RunSetup, prepare

_ready: dict[str, RunSetup] = {}  # by config: a process loads the model once, and serves any client with it


def in_process_app(config: Config, folder: Path) -> ClientApp:
    """An app that serves any client of a run and keeps their files in `folder`."""
    return flower_app.client_app(partial(handle, config=config, folder=folder))


def handle(
    kind: str, content: RecordDict, context: Context, config: Config | None = None, folder: Path | None = None
) -> RecordDict | str:
    """The answer to a message. Without a config it is Flower's run config; without a folder, the node's `state-dir`."""

    def client_for(message: RawMessage) -> handlers.ClientContext:
        setup = _setup(config or configuration.build(dict(context.run_config)))
        return _client(setup, folder or _state(context, message.run), context)

    return handlers.handle(kind, content, client_for)


def _setup(config: Config) -> RunSetup:
    """The run's model and data, of this process's last message where that had the same config."""
    key = repr(config)
    if key not in _ready:
        _ready.clear()
        _ready[key] = prepare(config)
    return _ready[key]


def _state(context: Context, run: str) -> Path:
    """The folder in which the node keeps the files of this run's clients."""
    return Path(str(context.node_config.get("state-dir", "runs/clients"))) / (run or str(context.run_id))


def _client(setup: RunSetup, folder: Path, context: Context) -> handlers.ClientContext:
    """The client that this node is. Raises `ClientFailed` where the data has no such client."""
    id = int(context.node_config.get("partition-id", -1))
    if not 0 <= id < len(setup.clients_data):
        raise ClientFailed(f"this node's partition-id is {id}; the data has clients 0 to {len(setup.clients_data) - 1}")
    runner = JobRunner(id, setup.clients_data[id], folder / str(id), policy_of(setup.config))
    return handlers.ClientContext(setup.model, runner, PartStore(runner.folder), setup.ranks[id])
