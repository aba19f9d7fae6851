"""What a client does with a message, in Flower's simulation or in the warm worker of a deployment."""

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

from flwr.app import RecordDict

from fedlora.client import agreement, training
from fedlora.client.egress import Answer, Egress, release_reason
from fedlora.client.part_cache import PartStore
from fedlora.client.runner import JobRunner
from fedlora.client.training import Outcome, TrainingTask
from fedlora.errors import ClientFailed, Failure, FedloraError, ReasonCode, TrainingDiverged, WireError
from fedlora.jobs import Job, Update
from fedlora.message_types import MOST_LOSS, MissingParts
from fedlora.messages import codec
from fedlora.messages.agreement import RunAgreement
from fedlora.messages.envelope import RawMessage, unpack
from fedlora.messages.parts import payload
from fedlora.models.model import Model
from fedlora.storage.event_log import EventLog

log = logging.getLogger("fedlora")
NO_LOG = EventLog(None)  # of no file, it writes nothing
LITTLE = 64 * 2**20  # bytes of numbers that any message may bring
TIMES = 16  # bytes for each number of the base model that a job may bring besides: four times the model in float32


@dataclass(frozen=True, eq=False)
class ClientContext:
    """One client with its runner, its files and the model of this process."""

    model: Model
    runner: JobRunner
    parts: PartStore  # what it need not be sent again
    rank: int
    event_log: EventLog = NO_LOG
    shows_rounds: bool = False  # is there a person to see each round's end?
    agreement: RunAgreement | None = None  # with the run; none in a simulation, where all are of one hand

    @property
    def egress(self) -> Egress:
        """The door through which this client's answers leave."""
        return Egress(self.runner.policy, self.event_log)

    def read_job(self, message: RawMessage) -> codec.IncomingJob:
        """The job in a message, with a line in the event log about what came in. Raises `WireError`."""
        check_bytes(len(message.numbers or b""), self.model)
        incoming = codec.read_job(message)
        nbytes = sum(part.nbytes for part in incoming.sent.values())
        entry = {"what": "job", "round": incoming.head.round + 1, "bytes": nbytes, "parts": list(incoming.sent)}
        self.event_log.write("entered", **entry)
        return incoming

    def refuse_unagreed(self, named: str, job: Job | None = None) -> None:
        """Raise `PrivacyError` for a message that is bound to another agreement, or a job that breaks this one."""
        if self.agreement:
            agreement.refuse_unagreed(self.agreement, named, job)

    def assemble(self, incoming: codec.IncomingJob) -> Job | MissingParts:
        """The job with all of its parts, or the names of those that neither came nor lie here.

        Raises `PrivacyError` for a job that is not as it was agreed.
        """
        self.refuse_unagreed(incoming.head.agreement)
        parts, missing = self.parts.take(incoming)
        if missing:
            return MissingParts(missing)
        job = incoming.job(parts)
        self.refuse_unagreed(incoming.head.agreement, job)
        return job


def check_bytes(nbytes: int, model: Model) -> None:
    """Raise `WireError` for a job of more bytes of numbers than any job for this model has."""
    most = LITTLE + TIMES * model.size
    if nbytes > most:
        raise WireError(f"a job brings {nbytes} bytes of numbers; with this model at most {most} are taken in")


def describe(client: ClientContext, message: RawMessage) -> Answer:
    """Answer who this client is. The examples that it tells are those that it trains on, by which it will weigh."""
    own = client.runner
    described = replace(own.client_data.client(own.id, client.rank), examples=len(own.client_data.train))
    return Answer(codec.pack_client(described, client.model.fingerprint))


def take_step(client: ClientContext, message: RawMessage) -> Answer:
    """Take a step of secure aggregation, and answer what the step asks for."""
    step = codec.read_secagg_step(message)
    client.refuse_unagreed(step.agreement)
    return Answer(codec.pack_secagg_reply(client.runner.reply(step)), step)


def train(client: ClientContext, message: RawMessage) -> Generator["PendingTraining", Outcome, Answer]:
    """Do a round's work, and answer with the update, or with the names of the parts that are missing for it.

    The training itself is yielded, so that it can be done with that of other clients.
    """
    incoming = client.read_job(message)
    job = client.assemble(incoming)
    if isinstance(job, MissingParts):
        return Answer(codec.pack_missing_parts(job), incoming)
    with closing(client.runner.steps(client.model, job, incoming.digest(job))) as steps:
        task = training.begin(steps)
        update = task if isinstance(task, Update) else training.end(steps, (yield PendingTraining(client.model, task)))
    _check_loss(update.loss)
    if client.shows_rounds:
        tensors, nbytes = payload(update)
        words = f"{nbytes:,} bytes leave for the server, of {len(tensors)} tensors"
        log.info("round %d of %d: %s", job.round + 1, job.rounds, words)
    return Answer(codec.pack_update(update, job.round), job)


def evaluate(client: ClientContext, message: RawMessage) -> Answer:
    """Evaluate the model that this client would use on its held-out examples, and answer with the metrics."""
    incoming = client.read_job(message)
    if client.agreement:
        agreement.refuse_scores(client.agreement)
    job = client.assemble(incoming)
    if isinstance(job, MissingParts):
        return Answer(codec.pack_missing_parts(job), incoming)
    metrics = client.runner.evaluate(client.model, job, incoming.digest(job))
    if not metrics.targets:
        raise ClientFailed("it holds out no examples to evaluate on; see data.holdout", code=ReasonCode.DATA)
    _check_loss(metrics.loss / metrics.targets)
    return Answer(codec.pack_metrics(metrics), job)


def _check_loss(loss: float | None) -> None:
    """Raise `TrainingDiverged` for a loss that may not travel."""
    if loss is not None and not abs(loss) <= MOST_LOSS:
        raise TrainingDiverged(
            f"the loss is {loss:g}, beyond {MOST_LOSS:g}; a lower train.lr may help, or smaller numbers in a regression"
        )


HANDLERS: Mapping[str, Callable[[ClientContext, RawMessage], Answer]] = {
    "who": describe,
    "secure": take_step,
    "evaluate": evaluate,
}
CALLED = {"who": "joining the run", "secure": "secure aggregation", "train": "training", "evaluate": "evaluating"}


def handle(
    kind: str,
    records: RecordDict,
    client_for: Callable[[RawMessage], ClientContext],
    event_log: EventLog = NO_LOG,
    *,
    tells_all: bool = False,
) -> RecordDict | str:
    """Answer a message by the handler of its kind, or by the code of what went wrong.

    The sentence that goes with the code is for this machine's log alone; `tells_all` sends it too, and is for a
    simulation, whose server is this very machine and whose researcher has no log of each client to look into.
    """
    with closing(answering(kind, records, client_for, event_log, tells_all=tells_all)) as steps:
        begun = training.begin(steps)
        return (
            training.end(steps, training.outcome_of(begun.model, begun.task))
            if isinstance(begun, PendingTraining)
            else begun
        )


def answering(
    kind: str,
    records: RecordDict,
    client_for: Callable[[RawMessage], ClientContext],
    event_log: EventLog = NO_LOG,
    *,
    tells_all: bool = False,
) -> "AnswerSteps":
    """Answer a message as `handle` does, but for the training, which is yielded; what came of it is sent."""
    try:
        message = unpack(records)
        client = client_for(message)
        answer = (yield from train(client, message)) if kind == "train" else HANDLERS[kind](client, message)
        return client.egress.release(answer.stamped(message.run))
    except Exception as e:
        log.warning("%s failed: %s", CALLED.get(kind, kind), e, exc_info=not isinstance(e, FedloraError))
        failure = Failure.because_of(e)
        code = release_reason(failure, event_log)
        return failure.dumps() if tells_all else code


class PendingTraining(NamedTuple):
    """A training that a message asks for, and the model that it is done with."""

    model: Model
    task: TrainingTask


AnswerSteps = Generator[PendingTraining, Outcome, RecordDict | str]  # stops at most once
