"""Jobs, updates and metrics as messages: a head of plain values, and at most one array.

Flower charges by the array, so a message carries one. A job is made of parts (see `parts`), each a safetensors file
named by a hash of its bytes: the head names them all, and only those that the client lacks lie in the array, one after
another. The array of an answer is one safetensors file. Nothing is pickled; whatever does not fit its head or its hash
raises `WireError`. The server reads what clients send in `fedlora.server.upload_checks`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedlora.errors import WireError
from fedlora.jobs import Client, Job, SecAggStep, Update, holds_scales, why_no_projection, why_rows_cannot_stay
from fedlora.lora import LoRA
from fedlora.message_types import ClientInfo, JobHead, MetricsHead, MissingParts, SecAggReply, UpdateHead
from fedlora.metrics import Metrics
from fedlora.tensors import by_name, to_bytes

from .agreement import RunAgreement
from .envelope import RawMessage, as_array, build, pack, read_head
from .parts import IN_PARTS, FlatAdapter, content_hash, job_hash, part_names

MASKED = "masked"  # the name of a tensor that is no matrix of an adapter
SCALES = "scales "  # before the name of a matrix, the name of its rows' scales
PLAIN = (  # the fields of a Job that its head carries as they are
    *("trains", "shares", "sketch", "gain", "resumes", "example_clip", "privacy", "masking", "metrics"),
    *("upload", "feedback", "training", "seed", "round", "rounds", "turns", "smoothing", "scales"),
    *("keeps_rank", "stage"),
)


@dataclass(frozen=True, eq=False)
class IncomingJob:
    """A job as it came: the names of all its parts, and the parts that came with it."""

    head: JobHead
    sent: Mapping[str, FlatAdapter]  # name -> part

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all the parts that the job is made of."""
        return tuple(chain.from_iterable(self.head_parts.values()))

    @property
    def head_parts(self) -> dict[str, tuple[str, ...]]:
        """The names of the parts that each field of the job is made of."""
        return {name: getattr(self.head, name) for name in IN_PARTS}

    def job(self, parts: Mapping[str, LoRA]) -> Job:
        """The job, put together from its parts, given by name."""
        start, correction = (_whole(parts, names) for names in (self.head.start, self.head.correction))
        offset = tuple(parts[name] for name in self.head.offset)
        right = {m: x for name in self.head.right for m, x in parts[name].A.items()}
        left = {m: x for name in self.head.left for m, x in parts[name].B.items()}
        job = Job(start=start, offset=offset, right=right, left=left, correction=correction, **_plain(self.head))
        _check_sketch(job)
        _check_scales(job)
        if why := why_no_projection(job) or why_rows_cannot_stay(job):
            raise WireError(f"a job cannot be done as it came: {why}")
        return job

    def digest(self, job: Job) -> str:
        """The `job_hash` of this job, made of the names of its parts: `read_job` has verified those."""
        return job_hash(job, **self.head_parts)


class JobEncoder:
    """Encodes the jobs of a round. Parts that several clients lack are joined into one array once for all of them.

    Every job is bound to the run's agreement by its hash.
    """

    def __init__(self, agreement: str = "") -> None:
        self._agreement = agreement
        self._joined: dict[tuple[str, ...], ArrayRecord] = {}

    def job(self, job: Job, parts: Mapping[str, FlatAdapter], missing: Mapping[str, FlatAdapter]) -> RecordDict:
        """The message of a job, with those parts that its client lacks."""
        sent = {part.name: part.content for part in missing.values()}
        sizes = tuple((name, len(content)) for name, content in sent.items())
        head = build(JobHead, **_plain(job), **part_names(parts), sent=sizes, agreement=self._agreement)
        return pack(head, self._array(sent))

    def _array(self, sent: Mapping[str, bytes]) -> ArrayRecord | None:
        key = tuple(sent)
        if key and key not in self._joined:
            self._joined[key] = as_array(b"".join(sent.values()))
        return self._joined.get(key)


def read_job(message: RawMessage) -> IncomingJob:
    """The job in a message of `JobEncoder.job`. Raises `WireError`, as for a part that is not what its name says."""
    head, content = read_head(message, JobHead), message.numbers or b""
    sizes = [size for _, size in head.sent]
    if sum(sizes) != len(content) or min(sizes, default=0) < 0:
        raise WireError(f"a job's parts are {sum(sizes)} bytes by its head; {len(content)} came")
    pieces = (content[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True))
    return IncomingJob(head, {name: _verified(name, piece) for (name, _), piece in zip(head.sent, pieces, strict=True)})


def _whole(parts: Mapping[str, LoRA], names: Sequence[str]) -> LoRA:
    """The adapter whose sides are in these parts; where two have the same matrix, it is the first one's."""
    whole = LoRA()
    for name in names:
        whole = whole.over(parts[name])
    return whole


def _check_sketch(job: Job) -> None:
    """Refuse a sketch of rows that the job's own factors do not have."""
    for module, rows in job.sketch.items():
        a = job.start.A.get(module)
        if a is None or max(rows) >= len(a):
            found = 0 if a is None else len(a)
            raise WireError(f"a sketch names row {max(rows)} of {module}; the job's A has {found} rows")


def _check_scales(job: Job) -> None:
    """Refuse scales of heads where no head is trained and sent with them, or not in every step."""
    if job.scales and not holds_scales(job):
        raise WireError("a job has scales trained with a core R, and trains none, keeps it, or trains it in turn")


def _verified(name: str, content: bytes) -> FlatAdapter:
    if content_hash(content) != name:
        raise WireError(f"part {name[:12]!r} of a job is not what its hash says: it was damaged on its way")
    return FlatAdapter(content, name)


def pack_update(update: Update, round: int) -> RecordDict:
    """The message of an update, whose numbers travel in the type they have."""
    content = to_bytes(_tensors(update))
    loss = None if update.masked is not None else update.loss
    head = build(UpdateHead, update.examples, loss, update.spent, content_hash(content), round)
    return pack(head, as_array(content))


def _tensors(update: Update) -> dict[str, Tensor]:
    """The numbers of an update, by the names under which they travel."""
    if update.masked is not None:
        return {MASKED: update.masked}
    if update.packed is None:
        return by_name(update.lora)
    scales = {f"{SCALES}{name}": t for name, t in by_name(update.packed.scales).items()}
    return by_name(update.packed.numbers) | scales


def _plain(job: Job | JobHead) -> dict[str, Any]:
    """The fields of a job that its head carries as they are."""
    return {name: getattr(job, name) for name in PLAIN}


def pack_secagg_step(ask: SecAggStep) -> RecordDict:
    """The message of a step of secure aggregation."""
    return pack(ask)


def read_secagg_step(message: RawMessage) -> SecAggStep:
    """The step of secure aggregation in a message of `pack_secagg_step`. Raises `WireError`."""
    return read_head(message, SecAggStep)


def pack_secagg_reply(said: Mapping[str, str]) -> RecordDict:
    """The message of a client's answer to a step of secure aggregation."""
    return pack(build(SecAggReply, dict(said)))


def pack_metrics(metrics: Metrics) -> RecordDict:
    """The message of metrics, in which their table of sums is the array, if they have one."""
    head = build(MetricsHead, metrics.examples, metrics.targets, metrics.loss, metrics.correct)
    tables = metrics.tables()
    return pack(head, as_array(to_bytes(tables)) if tables else None)


def is_table(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Is this a table that metrics may bring: one of its name, number type (as safetensors has it) and shape?"""
    rows = shape[:1]
    forms = {"confusion": ("I64", (*rows, *rows)), "label_counts": ("I64", (*rows, 3)), "moments": ("F64", (5,))}
    forms["rewards"] = ("F64", (3,))
    return forms.get(name) == (dtype, shape) and len(rows) == 1


def pack_missing_parts(lacks: MissingParts) -> RecordDict:
    """The message that parts of a job are neither in its message nor with the client."""
    return pack(lacks)


def pack_client(client: Client, base: str = "") -> RecordDict:
    """The message of a client's description of itself, and the fingerprint of its base model."""
    return pack(build(ClientInfo, client, base))


def pack_join_request(agreement: RunAgreement) -> RecordDict:
    """The message of the question who a client is, which brings the agreement that the run offers."""
    return pack(agreement)


def read_join_request(message: RawMessage) -> RunAgreement:
    """The agreement in a message of `pack_join_request`. Raises `WireError`."""
    return read_head(message, RunAgreement)
