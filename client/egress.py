"""The one door out: whatever leaves a client passes `release` or `release_reason` as its last step.

An update, metrics, names of missing parts, a step of secure aggregation, an introduction: `release` looks at what is
really in the message, the head and the array's own header, and not at what a job said would be in it. It holds that
against the job and the client's policy, writes a line in audit.jsonl, and only then hands the message over. Of what
goes wrong a code leaves (`fedlora.reasons`), by `release_reason`. No other function sends anything.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from flwr.app import RecordDict

from fedlora.client.policy import ClientPolicy
from fedlora.errors import Failure, PolicyRefusal, ReasonCode, WireError
from fedlora.jobs import Job, SecAggStep, shared_start
from fedlora.message_types import ClientInfo, MetricsHead, MissingParts, SecAggReply, UpdateHead
from fedlora.messages.codec import MASKED, SCALES, IncomingJob, is_table
from fedlora.messages.envelope import RawMessage, read_either, read_head, stamp, unpack
from fedlora.models.model import Model
from fedlora.privacy.masked_update import layout, size
from fedlora.storage.event_log import EventLog
from fedlora.tensors import Form, forms, number_bytes

Shape = tuple[int | None, ...]  # None: of any size
ENCODED = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}  # the number types of an update, as safetensors has them


@dataclass(frozen=True, eq=False)
class Answer:
    """A message that is ready to leave, and what it answers."""

    records: RecordDict
    to: Job | IncomingJob | SecAggStep | None = None  # None: the question who this client is

    def stamped(self, run: str) -> "Answer":
        """The answer, marked with the name of its run."""
        return replace(self, records=stamp(self.records, run))


@dataclass(frozen=True, eq=False)
class Egress:
    """What a client's answers are held against, and where they are written down."""

    policy: ClientPolicy
    event_log: EventLog = field(default_factory=lambda: EventLog(None))  # of no file, it writes nothing

    def release(self, answer: Answer) -> RecordDict:
        """The message, once it is found to hold no more than it may, and is in the event log.

        Raises `PolicyRefusal` for anything else; then nothing leaves.
        """
        try:
            entry = _entry(unpack(answer.records), answer.to, self.policy)
        except WireError as e:  # a malformed answer is no fault of the server's message
            raise _kept_back(str(e)) from e
        self.event_log.write("left", **entry)
        return answer.records


def release_reason(failure: Failure, event_log: EventLog) -> ReasonCode:
    """The code of a failure, once it is in the event log: all that leaves of what went wrong."""
    code = failure.code or ReasonCode.ERROR
    event_log.write("left", what="reason", reason=code)
    return code


def check_start(model: Model, job: Job) -> None:
    """Raise `PolicyRefusal` for a job whose start lacks a matrix of a side that it trains or shares, or that corrects
    the gradient of one which it does not train.

    The model still holds what it had last in such a side, which may be what a client keeps for itself.
    """
    for side in {*job.trains, *job.shares} - set("RD"):
        lacking = model.modules(side) - job.start.side(side).keys()
        if lacking:
            raise PolicyRefusal(
                f"the job trains or shares side {side}, and its start has {len(lacking)} modules of it less than the "
                "model; only what the server sent can be trained and sent back",
                code=ReasonCode.EGRESS,
            )
    for side, module, t in job.correction.matrices():
        trained = job.start.side(side).get(module) if side in job.trains else None
        if trained is None or trained.shape != t.shape:
            found = "none that is trained" if trained is None else str(tuple(trained.shape))
            raise PolicyRefusal(
                f"the job corrects the gradient of {side} {module} by {tuple(t.shape)}, and its start has {found}",
                code=ReasonCode.EGRESS,
            )


def _entry(message: RawMessage, to: object, policy: ClientPolicy) -> Mapping[str, Any]:
    """The fields of the log's line about a message, which is held against what it answers by the way."""
    if isinstance(to, Job):
        head = read_either(message, UpdateHead, MetricsHead)
        if isinstance(head, UpdateHead):
            return _update(head, message.numbers or b"", to, policy)
        return _metrics(head, message.numbers, to, policy)
    if message.numbers is not None:
        raise _kept_back("it has numbers, and answers no job")
    if isinstance(to, IncomingJob):
        return _missing(message, to)
    return _reply(message, to) if isinstance(to, SecAggStep) else _introduction(message)


def _introduction(message: RawMessage) -> Mapping[str, Any]:
    client = read_head(message, ClientInfo).client
    return {"what": "who", "client": client.id, "examples": client.examples, "records": client.records}


def _reply(message: RawMessage, step: SecAggStep) -> Mapping[str, Any]:
    read_head(message, SecAggReply)
    return {"what": f"secure {step.step}", "context": step.context}


def _missing(message: RawMessage, incoming: IncomingJob) -> Mapping[str, Any]:
    lacks = read_head(message, MissingParts).lacks
    if not set(lacks) <= set(incoming.names):
        raise _kept_back("it names parts that the job did not name")
    return {"what": "lacks", "round": incoming.head.round + 1, "parts": len(lacks)}


def _metrics(head: MetricsHead, content: bytes | None, job: Job, policy: ClientPolicy) -> Mapping[str, Any]:
    if not policy.metrics:
        raise _kept_back("it has metrics, and dp.metrics is not set here")
    found = forms(content) if content is not None else {}
    if len(found) > 1 or not all(is_table(name, dtype, shape) for name, (dtype, shape) in found.items()):
        raise _kept_back(f"its metrics come with {_listed(found)}, not with a table of sums alone")
    return {"what": "metrics", "round": job.round + 1, "examples": head.examples}


def _update(head: UpdateHead, content: bytes, job: Job, policy: ClientPolicy) -> Mapping[str, Any]:
    for wrong in _wrong_words(head, job, policy):
        raise _kept_back(wrong)
    found = forms(content)
    _check_forms(found, _expected(job))
    policy.refuse_update(f"{s} {m}" for s, m, _ in layout(job))  # of a masked vector too, where these are in it
    stays = {"rows_kept": job.keeps_rank} if job.keeps_rank else {}  # the last of the rank, of every A and B
    return {"what": "update", "round": job.round + 1, "bytes": number_bytes(content), "tensors": list(found)} | stays


def _wrong_words(head: UpdateHead, job: Job, policy: ClientPolicy) -> Iterator[str]:
    """What an update's head says that it may not say."""
    if head.round != job.round:
        yield f"it is of round {head.round + 1}, the job of round {job.round + 1}"
    if head.loss is not None and not (job.metrics and policy.metrics):
        yield "it tells a loss"
    if bool(head.spent) != bool(job.privacy):
        yield "it tells what a ledger says, and the job was not private, or the other way round"


def _expected(job: Job) -> dict[str, tuple[str, Shape]]:
    """The tensors that an answer to this job has: number type and shape by name."""
    if job.masking:
        return {MASKED: ("I32", (size(job),))}
    shapes: dict[str, Shape] = {
        f"{s} {m}": _free_rank(s, t.shape) if job.resumes else tuple(t.shape)
        for s, m, t in shared_start(job).matrices()
    }
    scales = {f"{SCALES}{name}": ("F32", _scale_shape(name, shape)) for name, shape in shapes.items()}
    return {name: (ENCODED[job.upload], shape) for name, shape in shapes.items()} | (
        scales if job.upload == "int8" else {}
    )


def _free_rank(side: str, shape: tuple[int, ...]) -> Shape:
    """The shape of a matrix of any rank: the answer to a job that resumes is a change of the product."""
    rank_at = {"A": 0, "B": 1}.get(side)
    return tuple(None if i == rank_at else n for i, n in enumerate(shape))


def _scale_shape(name: str, shape: Shape) -> Shape:
    """The shape of a matrix's scales in int8: a scale a direction of A and B, a row of another, one for a vector."""
    if len(shape) < 2:
        return (1,)
    if name.startswith("R "):  # of all blocks of a core
        return (prod(n or 0 for n in shape[:-1]),)
    return (shape[1] if name.startswith("B ") and len(shape) == 2 else shape[0],)


def _check_forms(found: Mapping[str, Form], expected: Mapping[str, tuple[str, Shape]]) -> None:
    """Raise `PolicyRefusal` where a message's tensors are not those that the job's answer has."""
    if found.keys() != expected.keys():
        raise _kept_back(f"it has {_listed(found)}; the answer to this job has {_listed(expected)}")
    for name, (dtype, shape) in expected.items():
        is_type, has = found[name][0] == dtype, found[name][1]
        fits = len(has) == len(shape) and all(n in (None, m) for n, m in zip(shape, has, strict=True))
        if not (is_type and fits):
            raise _kept_back(f"its {name} is {found[name]}; the answer to this job has ({dtype!r}, {shape})")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"


def _kept_back(why: str) -> PolicyRefusal:
    return PolicyRefusal(f"an answer was kept back: {why}", code=ReasonCode.EGRESS)
