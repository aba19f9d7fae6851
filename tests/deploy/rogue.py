"""A client that is registered and means ill: its SuperNode and its keys are real, its worker is this one.

    python tests/deploy/rogue.py --socket S --state DIR --id 2 --sends nan,shape,round,random,same,huge

In round n it works out an honest update, and sends what the n-th word says in its place.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import torch
from flwr.app import ConfigRecord, RecordDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.client.deployment import relay, worker
from fedlora.client.deployment.health import SERVICE
from fedlora.client.deployment.worker_pb2 import Answer, AnswerPiece, Failed, Kind, Numbers, TaskPiece
from fedlora.messages.envelope import as_array, unpack
from fedlora.messages.parts import content_hash
from fedlora.tensors import from_bytes, to_bytes

HUGE = 2 * 2**30  # bytes
PIECES = HUGE // relay.CHUNK


@dataclass(frozen=True)
class Upload:
    """An answer that is being forged: what it says, and its numbers."""

    head: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def signed(self) -> RecordDict:
        """With the hash that belongs to these numbers, so that no hash gives it away."""
        content = to_bytes(self.tensors)
        head = self.head | {"name": content_hash(content)}
        return RecordDict({"head": ConfigRecord({"json": json.dumps(head)}), "array": as_array(content)})


def nan(honest: Upload) -> RecordDict:
    """One number of many is none."""
    name, t = next(iter(honest.tensors.items()))
    t.view(-1)[t.numel() // 2] = torch.nan
    return Upload(honest.head, honest.tensors | {name: t}).signed()


def shape(honest: Upload) -> RecordDict:
    """As many numbers as were asked for, the first matrix turned on its side."""
    name, t = next(iter(honest.tensors.items()))
    return Upload(honest.head, honest.tensors | {name: t.view(*reversed(t.shape))}).signed()


def round(honest: Upload) -> RecordDict:
    """A round that is to come."""
    return Upload(honest.head | {"round": honest.head["round"] + 7}, honest.tensors).signed()


def random(honest: Upload) -> RecordDict:
    """A head as it should be; bytes of no format where the numbers should be."""
    noise = os.urandom(len(to_bytes(honest.tensors)))
    return RecordDict({"head": ConfigRecord({"json": json.dumps(honest.head)}), "array": as_array(noise)})


def many(honest: Upload) -> RecordDict:
    """More examples than there are anywhere."""
    return Upload(honest.head | {"examples": 10**12}, honest.tensors).signed()


def none(honest: Upload) -> RecordDict:
    """No example at all."""
    return Upload(honest.head | {"examples": 0}, honest.tensors).signed()


def loss(honest: Upload) -> RecordDict:
    """A loss of which no two can be added."""
    return Upload(honest.head | {"loss": 1.7e308}, honest.tensors).signed()


def double(honest: Upload) -> RecordDict:
    """The same numbers in float64, which would turn the run's state into that."""
    return Upload(honest.head, {name: t.double() for name, t in honest.tensors.items()}).signed()


FORGED: dict[str, Callable[[Upload], RecordDict]] = {
    "nan": nan,
    "shape": shape,
    "round": round,
    "random": random,
    "many": many,
    "none": none,
    "loss": loss,
    "double": double,
}


def forge(honest: RecordDict, word: str) -> RecordDict:
    """An honest answer made a false one."""
    message = unpack(honest)
    false = FORGED[word](Upload(json.loads(message.head), from_bytes(message.numbers or b"")))
    false.config_records["head"]["run"] = message.run
    return false


def huge(honest: RecordDict, same: bool) -> Iterator[AnswerPiece]:
    """2 GB, made as they are sent; where they are the same over and over, Flower carries them once."""
    head, run, _ = relay.split(honest)
    told = Numbers(dtype="uint8", shape=[HUGE], bytes=HUGE)
    yield AnswerPiece(answer=Answer(run=run, head=head, numbers=told))
    for _ in range(PIECES):
        yield AnswerPiece(chunk=bytes(relay.CHUNK) if same else os.urandom(relay.CHUNK))


def handle(honest_worker: worker.WarmWorker, words: list[str], pieces: Iterator[TaskPiece]) -> Iterator[AnswerPiece]:
    """Answer a task: who it is honestly, a round's work as the words say."""
    task, data = next(pieces).task, b"".join(piece.chunk for piece in pieces)
    honest = honest_worker.handle_task(task, data)
    if isinstance(honest, str):
        yield AnswerPiece(failed=Failed(reason=honest))
        return
    if task.kind == Kind.TRAIN and json.loads(unpack(honest).head)["kind"] != "lacks":
        word = words[min(json.loads(task.head)["round"], len(words) - 1)]
        if word in ("nothing", "blank"):
            yield AnswerPiece(failed=Failed(reason=" " if word == "blank" else "it sends nothing"))
            return
        if word in ("same", "huge"):
            yield from huge(honest, word == "same")
            return
        honest = forge(honest, word)
    head, run, array = relay.split(honest)
    yield AnswerPiece(answer=Answer(run=run, head=head, numbers=relay.numbers(array)))
    yield from (AnswerPiece(chunk=chunk) for chunk in relay.chunks(array))


def main() -> None:
    """Serve until it is killed."""
    parser = argparse.ArgumentParser()
    for name in ("socket", "state", "id", "sends"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    honest_worker = worker.WarmWorker(worker.ClientIdentity(int(options.id), Path(options.state), {}))
    server = grpc.server(ThreadPoolExecutor(4), options=relay.OPTIONS)
    words = options.sends.split(",")
    method = grpc.stream_stream_rpc_method_handler(
        lambda pieces, _: handle(honest_worker, words, pieces), TaskPiece.FromString, AnswerPiece.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Do": method}),))
    state = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    server.add_insecure_port(f"unix:{options.socket}")
    server.start()
    state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    Event().wait()


if __name__ == "__main__":
    main()
