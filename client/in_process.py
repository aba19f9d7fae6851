"""A client whose worker is the ClientApp's own process: in Flower's simulation, where a process serves many clients."""

from pathlib import Path

from flwr.app import Context, RecordDict

from fedlora import config as configuration
from fedlora.client import handlers
from fedlora.client.part_cache import PartStore
from fedlora.client.policy import policy_of
from fedlora.client.runner import JobRunner
from fedlora.config import Config
from fedlora.errors import ClientFailed
from fedlora.messages.envelope import RawMessage
from fedlora.run.setup import RunSetup, prepare

NO_CACHE = {"data.cache": "off"}  # texts of a client whose server may be elsewhere lie on no disk, whatever it asks for
_ready: dict[str, RunSetup] = {}  # by config: a process loads the model once, and serves any client with it


def handle(kind: str, content: RecordDict, context: Context) -> RecordDict | str:
    """The answer to a message, by Flower's run config, of a client that keeps its files in the node's `state-dir`.

    Whether the server is on this machine is not known here, so that of what goes wrong a code is told and no more.
    """

    def client_for(message: RawMessage) -> handlers.ClientContext:
        setup = loaded(configuration.build(dict(context.run_config), NO_CACHE))
        return client_of(setup, _state(context, message.run), int(context.node_config.get("partition-id", -1)))

    return handlers.handle(kind, content, client_for)


def loaded(config: Config) -> RunSetup:
    """The run's model and data, of this process's last message where that had the same config."""
    key = repr(config)
    if key not in _ready:
        _ready.clear()
        _ready[key] = prepare(config)
    return _ready[key]


def _state(context: Context, run: str) -> Path:
    """The folder in which the node keeps the files of this run's clients."""
    return Path(str(context.node_config.get("state-dir", "runs/clients"))) / (run or str(context.run_id))


def client_of(setup: RunSetup, folder: Path, id: int) -> handlers.ClientContext:
    """The client that is this node's partition. Raises `ClientFailed` where the data has no such client."""
    if not 0 <= id < len(setup.clients_data):
        raise ClientFailed(f"this node's partition-id is {id}; the data has clients 0 to {len(setup.clients_data) - 1}")
    runner = JobRunner(id, setup.clients_data[id], folder / str(id), policy_of(setup.config))
    return handlers.ClientContext(setup.model, runner, PartStore(runner.folder), setup.ranks[id])
