"""The warm worker: one process that holds a client's model, data and kept state, and does jobs over a Unix socket.

It loads the base model once per run. Jobs are done one at a time, in the order in which they come. A job that comes
again, because the process that asked died meanwhile, gets the answer that lies on the disk.
"""

import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

import grpc
from flwr.app import RecordDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.client import agreement, handlers
from fedlora.client.deployment import relay
from fedlora.client.deployment.health import SERVICE
from fedlora.client.deployment.progress import STALLED, ProgressWatch
from fedlora.client.deployment.worker_pb2 import Answer, AnswerPiece, Failed, Kind, Task, TaskPiece
from fedlora.client.egress import release_reason
from fedlora.client.part_cache import PartStore
from fedlora.client.policy import client_policy
from fedlora.client.runner import JobRunner
from fedlora.errors import Failure, FedloraError, WireError
from fedlora.messages import codec
from fedlora.messages.agreement import RunAgreement
from fedlora.messages.envelope import RUN, RawMessage
from fedlora.run.preview import Preview
from fedlora.run.setup import ClientSetup, for_client
from fedlora.sections import ClientConfig
from fedlora.storage.event_log import EventLog
from fedlora.storage.files import secret_key, write_durably

TAKEN = ("ledgers", "logs", "runs")  # folders of a client's state that are no run's
log = logging.getLogger("fedlora")


@dataclass(frozen=True)
class ClientIdentity:
    """A client's number, its folder, and its own settings."""

    id: int
    state: Path  # the folder of all that the client keeps
    settings: Mapping[str, Any]  # by dotted keys: data, devices, what the client insists on


class Worker(Protocol):
    """What answers tasks at the socket."""

    def check_size(self, task: Task) -> None:
        """Raise `WireError` for a task that says it brings too many bytes."""

    def handle_task(self, task: Task, data: bytes) -> RecordDict | str:
        """The answer to a task, or the code of why there is none."""

    def refuse(self, error: Exception) -> str:
        """The code of why a task could not be taken in."""


@dataclass
class WarmWorker:
    """Answers a client's messages, and keeps the model and the data loaded between them."""

    identity: ClientIdentity
    _key: str = ""  # the hash of the agreement by which the setup was made
    _setup: ClientSetup | None = None
    _lock: Lock = field(default_factory=Lock)
    watch: ProgressWatch = field(default_factory=lambda: ProgressWatch(0, print))

    def check_size(self, task: Task) -> None:
        """Raise `WireError` for a task that says it brings more bytes than the model can have use for."""
        if task.numbers.bytes > handlers.LITTLE:
            with self._lock:
                setup = self._setup or self._setup_of_run(task.run)
            handlers.check_bytes(task.numbers.bytes, setup.model)

    def handle_task(self, task: Task, data: bytes) -> RecordDict | str:
        """The answer to a task, or the code of why there is none. One task is done at a time."""
        content = relay.records(task.head, task.run, task.numbers if task.HasField("numbers") else None, data)
        kind = Kind.Name(task.kind).lower()
        with self._lock, self.watch.working_on(handlers.CALLED[kind]):
            return self.answer(kind, content)

    def refuse(self, error: Exception) -> str:
        """The code of why a task could not be taken in, once it is in the event log."""
        log.warning("a message could not be taken in: %s", error, exc_info=not isinstance(error, FedloraError))
        return release_reason(Failure.because_of(error), self._event_log(""))

    def answer(self, kind: str, content: RecordDict) -> RecordDict | str:
        """The answer to a message, or the code of why there is none.

        The question who this client is brings the run's agreement, by which all later messages are answered.
        """

        def client_for(message: RawMessage) -> handlers.ClientContext:
            return self._context(message.run, codec.read_join_request(message) if kind == "who" else None)

        return handlers.handle(kind, content, client_for, self._event_log(relay.split(content)[1]))

    def _event_log(self, run: str) -> EventLog:
        return EventLog(self.identity.state / "audit.jsonl", side="client", client=self.identity.id, run=run)

    def _context(self, run: str, offered: RunAgreement | None = None) -> handlers.ClientContext:
        """What answers a run's messages; `offered` is the run's agreement, if it came with this message."""
        identity = self.identity
        folder = run_folder(identity, run)
        policy = client_policy(identity.settings, identity.state / "ledgers")
        if offered:
            agreement.join(folder, offered, policy, run)
        agreed = agreement.kept(folder)
        setup = self._setup_for(agreed, folder)
        runner = JobRunner(identity.id, setup.client_data, folder, policy, once=True)
        store, log_of_run = PartStore(folder), self._event_log(run)
        return handlers.ClientContext(
            setup.model, runner, store, setup.rank, log_of_run, shows_rounds=True, agreement=agreed
        )

    def _setup_of_run(self, run: str) -> ClientSetup:
        folder = run_folder(self.identity, run)
        return self._setup_for(agreement.kept(folder), folder)

    def _setup_for(self, agreed: RunAgreement, folder: Path) -> ClientSetup:
        """The model and the data by a run's agreement: those that are loaded, if it is the same.

        What is new is shown to the operator, and kept in the run's `folder`; nothing of it leaves this machine.
        """
        if self._setup is None or agreed.hash != self._key:
            self._setup = None  # free the memory first: there may be no room for two models
            key = secret_key(self.identity.state / "split.key")  # the server's seed does not say who is held out
            setup = for_client(agreed.settings, self.identity.settings, self.identity.id, key)
            self._setup, self._key = setup, agreed.hash
            _show_preview(setup.preview, folder)
            self.watch.follow(self._setup.model.net)
        elif not (folder / "inputs.json").exists():  # another run by the same agreement
            _show_preview(self._setup.preview, folder)
        return self._setup


def _show_preview(preview: Preview, folder: Path) -> None:
    """Log what this client is about to do in a run, and keep it as `inputs.json`, which its owner alone can read."""
    for line in preview.lines():
        log.info("  %s", line)
    write_durably(folder / "inputs.json", f"{json.dumps(preview.record(), indent=1)}\n".encode(), mode=0o600)


def run_folder(identity: ClientIdentity, run: str) -> Path:
    """The folder of what a client keeps of a run, apart from its ledgers and logs, whatever the run is called.

    Raises `WireError` for a name that cannot be a folder's. A run that an older version began stays where it began.
    """
    if not run or not re.fullmatch(RUN, run):
        raise WireError("a message names no run, and this client keeps its state by it")
    earlier = identity.state / run / str(identity.id)
    if run not in TAKEN and earlier.is_dir():
        return earlier
    return identity.state / "runs" / run / str(identity.id)


def answer_once(file: Path, kind: str, content: RecordDict) -> RecordDict | str:
    """The answer to a message in this process, which loads the model for it; the file holds the client's identity."""
    values = json.loads(file.read_text())
    identity = ClientIdentity(int(values["id"]), Path(values["state"]), values["settings"])
    return WarmWorker(identity).answer(kind, content)


def serve(socket: Path, identity: ClientIdentity) -> None:
    """Serve at a socket that only its owner can open, until SIGTERM or SIGINT."""
    ended = Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: ended.set())
    _log_to_screen(identity.state / "logs" / "screen.log")
    watch = ProgressWatch(float(identity.settings.get("client.stall", ClientConfig.stall)), _end_stalled)
    server, state = start(socket, WarmWorker(identity, watch=watch))
    watch.start()
    log.info("worker of client %d is ready", identity.id)
    ended.wait()
    state.enter_graceful_shutdown()
    server.stop(grace=1).wait()
    os._exit(0)  # a job that is being done ends here; it is done anew when it comes again


def _end_stalled(what: str) -> None:
    """End this process, whose work stands still; `fedlora client` starts it again."""
    log.error("%s made no progress for as long as client.stall allows; the worker ends, and is started again", what)
    os._exit(STALLED)


def _log_to_screen(screen: Path) -> None:
    """Write the log from INFO on to the file that `fedlora client` shows, too; all of it goes to this process's log."""
    screen.parent.mkdir(parents=True, exist_ok=True)
    shown = logging.FileHandler(screen)
    shown.setLevel(logging.INFO)
    log.addHandler(shown)
    log.setLevel(logging.DEBUG)


def start(socket: Path, worker: Worker) -> tuple[grpc.Server, health.HealthServicer]:
    """Start a gRPC server at the socket that answers tasks by this worker; return it with its health service."""
    socket.unlink(missing_ok=True)
    os.umask(0o077)
    server = grpc.server(ThreadPoolExecutor(4), options=relay.OPTIONS)
    method = grpc.stream_stream_rpc_method_handler(
        lambda pieces, context: _handle(worker, pieces), TaskPiece.FromString, AnswerPiece.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Do": method}),))
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    return server, state


def _handle(worker: Worker, pieces: Iterator[TaskPiece]) -> Iterator[AnswerPiece]:
    """Take in a task with its numbers, in pieces, and give out the answer in pieces."""
    try:
        task, data = _take_in(pieces, worker.check_size)
        answer = worker.handle_task(task, data)
    except Exception as e:
        answer = worker.refuse(e)
    if isinstance(answer, str):
        yield AnswerPiece(failed=Failed(reason=answer))
        return
    head, run, array = relay.split(answer)
    yield AnswerPiece(answer=Answer(run=run, head=head, numbers=relay.numbers(array)))
    yield from (AnswerPiece(chunk=chunk) for chunk in relay.chunks(array))


def _take_in(pieces: Iterator[TaskPiece], check_size: Callable[[Task], None]) -> tuple[Task, bytes]:
    """A task and its numbers. Raises `WireError` for more bytes than it says, or may bring, or for less."""
    task, data = next(pieces).task, bytearray()
    check_size(task)
    for piece in pieces:
        data += piece.chunk
        if len(data) > task.numbers.bytes:
            break
    if len(data) != task.numbers.bytes:
        raise WireError(f"a task brought {len(data)} bytes; it said {task.numbers.bytes}")
    return task, bytes(data)
