"""What a client does with a message, in Flower's simulation or in the warm worker of a deployment."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import RecordDict

from fedlora.client import agreement
from fedlora.client.part_cache import PartStore
from fedlora.client.runner import JobRunner
from fedlora.errors import Failure, FedloraError
from fedlora.jobs import Job
from fedlora.messages import codec, envelope
from fedlora.messages.agreement import RunAgreement
from fedlora.messages.envelope import RawMessage, unpack
from fedlora.messages.parts import payload
from fedlora.models.model import Model
from fedlora.storage.event_log import EventLog

log = logging.getLogger("fedlora")


@dataclass(frozen=True, eq=False)
class ClientContext:
    """One client with its runner, its files and the model of this process."""

    model: Model
    runner: JobRunner
    parts: PartStore  # what it need not be sent again
    rank: int
    event_log: EventLog = EventLog(None)  # noqa: RUF009  of no file, it writes nothing
    shows_rounds: bool = False  # is there a person to see each round's end?
    agreement: RunAgreement | None = None  # with the run; none in a simulation, where all are of one hand

    def read_job(self, message: RawMessage) -> codec.IncomingJob:
        """The job in a message, with a line in the event log about what came in."""
        incoming = codec.read_job(message)
        nbytes = sum(part.nbytes for part in incoming.sent.values())
        entry = {"what": "job", "round": incoming.head.round + 1, "bytes": nbytes, "parts": list(incoming.sent)}
        self.event_log.write("entered", **entry)
        return incoming

    def refuse_unagreed(self, named: str, job: Job | None = None) -> None:
        """Raise `PrivacyError` for a message that is bound to another agreement, or a job that breaks this one."""
        if self.agreement:
            agreement.refuse_unagreed(self.agreement, named, job)

    def assemble(self, incoming: codec.IncomingJob) -> Job | codec.MissingParts:
        """The job with all of its parts, or the names of those that neither came nor lie here.

        Raises `PrivacyError` for a job that is not as it was agreed.
        """
        self.refuse_unagreed(incoming.head.agreement)
        parts, missing = self.parts.take(incoming)
        if missing:
            return codec.MissingParts(missing)
        job = incoming.job(parts)
        self.refuse_unagreed(incoming.head.agreement, job)
        return job


def describe(client: ClientContext, message: RawMessage) -> RecordDict:
    """Answer who this client is."""
    runner = client.runner
    client.event_log.write("left", what="who", client=runner.id)
    return codec.pack_client(runner.client_data.client(runner.id, client.rank), client.model.fingerprint)


def take_step(client: ClientContext, message: RawMessage) -> RecordDict:
    """Take a step of secure aggregation, and answer what the step asks for."""
    step = codec.read_secagg_step(message)
    client.refuse_unagreed(step.agreement)
    client.event_log.write("left", what=f"secure {step.step}", context=step.context)
    return codec.pack_secagg_reply(client.runner.reply(step))


def train(client: ClientContext, message: RawMessage) -> RecordDict:
    """Do a round's work, and answer with the update, or with the names of the parts that are missing for it."""
    incoming = client.read_job(message)
    job = client.assemble(incoming)
    if isinstance(job, codec.MissingParts):
        return codec.pack_missing_parts(job)
    update = client.runner.run(client.model, job, incoming.digest(job))
    tensors, nbytes = payload(update)
    client.event_log.write("left", what="update", round=job.round + 1, bytes=nbytes, tensors=tensors)
    if client.shows_rounds:
        words = f"{nbytes:,} bytes leave for the server, of {len(tensors)} tensors"
        log.info("round %d of %d: %s", job.round + 1, job.rounds, words)
    return codec.pack_update(update, job.round)


def evaluate(client: ClientContext, message: RawMessage) -> RecordDict:
    """Evaluate the model that this client would use on its held-out examples, and answer with the metrics."""
    incoming = client.read_job(message)
    job = client.assemble(incoming)
    if isinstance(job, codec.MissingParts):
        return codec.pack_missing_parts(job)
    metrics = client.runner.evaluate(client.model, job, incoming.digest(job))
    client.event_log.write("left", what="metrics", round=job.round + 1)
    return codec.pack_metrics(metrics)


HANDLERS: Mapping[str, Callable[[ClientContext, RawMessage], RecordDict]] = {
    "who": describe,
    "secure": take_step,
    "train": train,
    "evaluate": evaluate,
}
CALLED = {"who": "joining the run", "secure": "secure aggregation", "train": "training", "evaluate": "evaluating"}


def handle(kind: str, records: RecordDict, client_for: Callable[[RawMessage], ClientContext]) -> RecordDict | str:
    """Answer a message by the handler of its kind; of what goes wrong, answer the failure's kind and one sentence."""
    try:
        message = unpack(records)
        return envelope.stamp(HANDLERS[kind](client_for(message), message), message.run)
    except FedloraError as e:
        log.warning("%s failed: %s", CALLED.get(kind, kind), e)
        return Failure.because_of(e).dumps()
    except Exception as e:
        log.warning("%s failed", CALLED.get(kind, kind), exc_info=True)
        return Failure.because_of(e).dumps()
