"""Send a message from Flower's ClientApp, a new process for each, to the warm worker beside it. Loads no torch."""

from collections.abc import Iterator

import grpc
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.client.deployment.worker_pb2 import Answer, AnswerPiece, Kind, Numbers, Task, TaskPiece
from fedlora.errors import ClientFailed, Failure, ReasonCode

METHOD = "/fedlora.client.v1.Worker/Do"
CHUNK = 2**20  # bytes of numbers in a piece
OPTIONS = [("grpc.max_receive_message_length", 32 * 2**20), ("grpc.max_send_message_length", 32 * 2**20)]
COMES_BACK = 120.0  # seconds that a worker which died is given until it answers again
TRIES = 2  # times that a message is sent to a worker that dies of it


class WorkerGone(ClientFailed):
    """No worker answered: it did not come back after `fedlora client` started it again, or died of the job twice."""

    code = ReasonCode.CRASHED


class WorkerFailed(ClientFailed):
    """The worker has no answer to a message; the code says why."""


def ask(address: str, kind: str, content: RecordDict, timeout: float | None) -> RecordDict:
    """The worker's answer to a message. Raises `WorkerGone`, or `WorkerFailed` with the code that the worker told.

    A worker that dies of a message gets it once more. It does no harm to ask twice: a job that is done already has the
    same answer again.
    """
    for _ in range(TRIES):
        answer = _ask_once(address, kind, content, timeout)
        if answer is not None:
            return answer
    raise WorkerGone(f"the worker died {TRIES} times at this job")


def _ask_once(address: str, kind: str, content: RecordDict, timeout: float | None) -> RecordDict | None:
    """The worker's answer; none if the worker died meanwhile."""
    try:
        with grpc.insecure_channel(address, options=OPTIONS) as channel:  # a Unix socket that its owner alone opens
            grpc.channel_ready_future(channel).result(timeout=COMES_BACK)
            call = channel.stream_stream(METHOD, TaskPiece.SerializeToString, AnswerPiece.FromString)
            return _collect(call(_pieces(kind, content), timeout=timeout))
    except grpc.FutureTimeoutError as e:
        raise WorkerGone(f"no worker came back within {COMES_BACK:.0f} s") from e
    except grpc.RpcError as e:
        if e.code() == grpc.StatusCode.UNAVAILABLE:
            return None
        raise WorkerGone(f"the worker said {e.code().name}: {e.details()}") from e


def split(content: RecordDict) -> tuple[str, str, Array | None]:
    """The head of a message as JSON, the name of its run, and its array, if the message has exactly one."""
    head = content.config_records.get("head", ConfigRecord())
    arrays = [a for record in content.array_records.values() for a in record.values()]
    return str(head.get("json", "")), str(head.get("run", "")), arrays[0] if len(arrays) == 1 else None


def records(head: str, run: str, numbers: Numbers | None, data: bytes) -> RecordDict:
    """The message with this head, this run and, if `numbers` describes one, an array of these bytes."""
    content = RecordDict({"head": ConfigRecord({"json": head, "run": run})})
    if numbers is not None:
        content["array"] = ArrayRecord({"numbers": Array(numbers.dtype, tuple(numbers.shape), "safetensors", data)})
    return content


def numbers(array: Array | None) -> Numbers | None:
    """The description of an array that goes before its bytes; none without an array."""
    return Numbers(dtype=array.dtype, shape=array.shape, bytes=len(array.data)) if array else None


def chunks(array: Array | None) -> Iterator[bytes]:
    """The bytes of an array in pieces of `CHUNK`; nothing without an array."""
    data = array.data if array else b""
    yield from (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))


def _pieces(kind: str, content: RecordDict) -> Iterator[TaskPiece]:
    """A message as a task and its bytes."""
    head, run, array = split(content)
    task = Task(kind=Kind.Value(kind.upper()), run=run, head=head, numbers=numbers(array))
    yield TaskPiece(task=task)
    yield from (TaskPiece(chunk=chunk) for chunk in chunks(array))


def _collect(pieces: Iterator[AnswerPiece]) -> RecordDict:
    """The message that came as an answer and its bytes. Raises `WorkerFailed` with the code that came instead."""
    first, data = next(pieces), bytearray()
    if first.HasField("failed"):
        told = Failure.told(first.failed.reason)
        raise WorkerFailed(told.reason, code=told.code)
    for piece in pieces:
        data += piece.chunk
    answer: Answer = first.answer
    return records(answer.head, answer.run, answer.numbers if answer.HasField("numbers") else None, bytes(data))
