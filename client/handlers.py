"""What a client does with a message, in Flower's simulation or in the warm worker of a deployment."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import RecordDict

from fedlora.client import training
from fedlora.client.part_cache import PartStore
from fedlora.client.runner import JobRunner
from fedlora.errors import Failure, FedloraError
from fedlora.jobs import Job
from fedlora.messages import codec
from fedlora.messages.parts import payload
from fedlora.models.model import Model
from fedlora.storage.client_state import ClientState
from fedlora.storage.event_log import EventLog

log = logging.getLogger("fedlora")


@dataclass(frozen=True, eq=False)
class ClientContext:
    """One client's place at this process's model."""

    model: Model
    runner: JobRunner
    parts: PartStore  # what it need not be sent again
    rank: int
    journal: EventLog = EventLog(None)  # noqa: RUF009  of none, it writes nothing
    told: bool = False  # is there a person to see each round's end?

    def job(self, content: RecordDict) -> Job | codec.MissingParts:
        """The job of a message, or what is lacking for it."""
        order = codec.read_order(content)
        nbytes = sum(flat.nbytes for flat in order.sent.values())
        self.journal.write("entered", what="job", round=order.head.round + 1, bytes=nbytes, parts=list(order.sent))
        parts, lacks = self.parts.take(order)
        return codec.MissingParts(lacks) if lacks else order.job(parts)


def describe(place: ClientContext, content: RecordDict) -> RecordDict:
    """Who this client is."""
    runner = place.runner
    place.journal.write("left", what="who", client=runner.id)
    return codec.pack_client(runner.client_data.client(runner.id, place.rank), place.model.fingerprint)


def take_step(place: ClientContext, content: RecordDict) -> RecordDict:
    """A step of secure aggregation."""
    ask = codec.read_ask(content)
    place.journal.write("left", what=f"secure {ask.step}", context=ask.context)
    return codec.pack_said(place.runner.reply(ask))


def train(place: ClientContext, content: RecordDict) -> RecordDict:
    """One round's work."""
    job = place.job(content)
    if isinstance(job, codec.MissingParts):
        return codec.pack_lacks(job)
    update = place.runner.run(place.model, job)
    tensors, nbytes = payload(update)
    place.journal.write("left", what="update", round=job.round + 1, bytes=nbytes, tensors=tensors)
    if place.told:
        words = f"{nbytes:,} bytes leave for the server, of {len(tensors)} tensors"
        log.info("round %d of %d: %s", job.round + 1, job.rounds, words)
    return codec.pack_update(update, job.round)


def evaluate(place: ClientContext, content: RecordDict) -> RecordDict:
    """The model that this client would use, on its held-out examples."""
    job = place.job(content)
    if isinstance(job, codec.MissingParts):
        return codec.pack_lacks(job)
    kept = ClientState(place.runner.folder).before(job.round + 1)
    place.journal.write("left", what="metrics", round=job.round + 1)
    return codec.pack_metrics(training.evaluate(place.model, job, place.runner.client_data.heldout, kept))


WORKS: Mapping[str, Callable[[ClientContext, RecordDict], RecordDict]] = {
    "who": describe,
    "secure": take_step,
    "train": train,
    "evaluate": evaluate,
}
CALLED = {"who": "joining the run", "secure": "secure aggregation", "train": "training", "evaluate": "evaluating"}


def do(kind: str, records: RecordDict, place: Callable[[str], ClientContext]) -> RecordDict | str:
    """Do the work at the place that a run has here; what goes wrong is a failure's kind and one sentence about it."""
    try:
        run = codec.run_of(records)
        return codec.stamp(WORKS[kind](place(run), records), run)
    except FedloraError as e:
        log.warning("%s failed: %s", CALLED.get(kind, kind), e)
        return Failure.because_of(e).dumps()
    except Exception as e:
        log.warning("%s failed", CALLED.get(kind, kind), exc_info=True)
        return Failure.because_of(e).dumps()
