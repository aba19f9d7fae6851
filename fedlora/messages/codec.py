"""Jobs, updates and metrics as messages: a head of plain values, and at most one array.

Flower's cost is per array, so a message carries one. A job is made of parts (see `flat`), each a safetensors file named
by a hash of its bytes: the head names them all, and only those that the client lacks lie in the array, one after
another. The array of an answer is one safetensors file. Nothing is pickled; whatever does not fit its head or its hash
raises `WireError`. What the server reads is in `admit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from flwr.app import ArrayRecord, RecordDict
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from fedlora.errors import WireError
from fedlora.jobs import Client, Job, MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep, Update
from fedlora.lora import LoRA
from fedlora.metrics import Metrics
from fedlora.sections import Encoding, Training
from fedlora.tensors import by_name, to_bytes

from .envelope import RawMessage, as_array, pack, read_head
from .envelope import stamp as stamp
from .parts import FlatAdapter, content_hash, job_hash, names

CONFUSION, MASKED = "confusion", "masked"  # names of tensors that are no matrix of an adapter
SCALES = "scales "  # before the name of a matrix, the name of its rows' scales
STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
PLAIN = (  # of a Job
    *("trains", "shares", "sketch", "gain", "resumes", "example_clip", "privacy", "masking", "metrics"),
    *("upload", "feedback", "training", "seed", "round", "rounds"),
)


@checked(frozen=True, config=STRICT)
class JobHead:
    """A Job but for the numbers in its parts."""

    trains: str
    shares: str
    sketch: dict[str, tuple[int, ...]]
    gain: dict[str, float]
    resumes: bool
    example_clip: float
    privacy: PrivacyTerms | None
    masking: MaskingTerms | None
    metrics: bool
    upload: Encoding
    feedback: bool
    training: Training
    seed: int
    round: int
    rounds: int
    start: tuple[str, ...]  # names of parts
    offset: tuple[str, ...]
    sent: tuple[tuple[str, int], ...]  # (name, bytes) of the parts in the array, in their order


@checked(frozen=True, config=STRICT)
class UpdateHead:
    """An Update but for its numbers."""

    examples: int
    loss: float | None
    spent: PrivacySpent | None
    name: str  # hash of the array's bytes
    round: int
    kind: Literal["update"] = "update"


@checked(frozen=True, config=STRICT)
class MetricsHead:
    """Metrics but for the confusion of a classifier."""

    examples: int
    targets: int
    loss: float
    correct: int
    kind: Literal["metrics"] = "metrics"


@checked(frozen=True, config=STRICT)
class JoinRequest:
    """The question who a client is, with the run's settings that a client goes by."""

    settings: dict[str, int | float | str | bool]


@checked(frozen=True, config=STRICT)
class ClientInfo:
    """A client's answer to the question who it is."""

    client: Client
    base: str  # fingerprint of its base model


@checked(frozen=True, config=STRICT)
class MissingParts:
    """The answer of a client whose parts are lost: it wants the job in full."""

    lacks: tuple[str, ...]
    kind: Literal["lacks"] = "lacks"


@checked(frozen=True, config=STRICT)
class SecAggReply:
    """What a client says in a step of secure aggregation."""

    said: dict[str, str]


@dataclass(frozen=True, eq=False)
class IncomingJob:
    """A job as it arrived: which parts it is made of, and those that came with it."""

    head: JobHead
    sent: Mapping[str, FlatAdapter]  # by name

    @property
    def names(self) -> tuple[str, ...]:
        """All the parts that the job is made of."""
        return (*self.head.start, *self.head.offset)

    def job(self, parts: Mapping[str, LoRA]) -> Job:
        """The job, of parts by their names."""
        start = LoRA()
        for name in self.head.start:
            start = start.over(parts[name])
        offset = tuple(parts[name] for name in self.head.offset)
        return Job(start=start, offset=offset, **_plain(self.head))

    def digest(self, job: Job) -> str:
        """The name of this order's job, of the part names that were verified when the order was read."""
        return job_hash(job, self.head.start, self.head.offset)


class JobEncoder:
    """Packs the jobs of a round; the parts that several clients lack are joined into an array once."""

    def __init__(self) -> None:
        self._joined: dict[tuple[str, ...], ArrayRecord] = {}

    def job(self, job: Job, parts: Mapping[str, FlatAdapter], missing: Mapping[str, FlatAdapter]) -> RecordDict:
        """The job with those parts that its client lacks."""
        sent = {flat.name: flat.content for flat in missing.values()}
        start, offset = names(parts)
        sizes = tuple((name, len(content)) for name, content in sent.items())
        return pack(JobHead(**_plain(job), start=start, offset=offset, sent=sizes), self._array(sent))

    def _array(self, sent: Mapping[str, bytes]) -> ArrayRecord | None:
        key = tuple(sent)
        if key and key not in self._joined:
            self._joined[key] = as_array(b"".join(sent.values()))
        return self._joined.get(key)


def read_job(message: RawMessage) -> IncomingJob:
    """The job that `Packer.job` packed; its parts have the hashes that the head names. Raises `WireError`."""
    head, content = read_head(message, JobHead), message.numbers or b""
    sizes = [size for _, size in head.sent]
    if sum(sizes) != len(content) or min(sizes, default=0) < 0:
        raise WireError(f"a job's parts are {sum(sizes)} bytes by its head; {len(content)} came")
    sent = {}
    for (name, size), end in zip(head.sent, accumulate(sizes), strict=True):
        sent[name] = FlatAdapter(content[end - size : end], name)
        if content_hash(sent[name].content) != name:
            raise WireError(f"part {name[:12]!r} of a job is not what its hash says: it was damaged on its way")
    return IncomingJob(head, sent)


def pack_update(update: Update, round: int) -> RecordDict:
    """An update; its numbers travel in the type they have."""
    content = to_bytes(_tensors(update))
    loss = None if update.masked is not None else update.loss
    head = UpdateHead(update.examples, loss, update.spent, content_hash(content), round)
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


def pack_ask(ask: SecAggStep) -> RecordDict:
    """A step of secure aggregation."""
    return pack(ask)


def read_ask(message: RawMessage) -> SecAggStep:
    """What `pack_ask` packed. Raises `WireError`."""
    return read_head(message, SecAggStep)


def pack_said(said: Mapping[str, str]) -> RecordDict:
    """The answer to a step of secure aggregation."""
    return pack(SecAggReply(dict(said)))


def pack_metrics(metrics: Metrics) -> RecordDict:
    """Metrics; the confusion of a classifier is the array."""
    head = MetricsHead(metrics.examples, metrics.targets, metrics.loss, metrics.correct)
    table = metrics.confusion
    return pack(head, None if table is None else as_array(to_bytes({CONFUSION: table})))


def pack_missing_parts(lacks: MissingParts) -> RecordDict:
    """That parts are neither in the message nor with the client."""
    return pack(lacks)


def pack_client(client: Client, base: str = "") -> RecordDict:
    """What a client says of itself, and the fingerprint of its base model."""
    return pack(ClientInfo(client, base))


def pack_hello(settings: Mapping[str, int | float | str | bool]) -> RecordDict:
    """The question who a client is."""
    return pack(JoinRequest(dict(settings)))


def read_hello(message: RawMessage) -> JoinRequest:
    """What `pack_hello` packed. Raises `WireError`."""
    return read_head(message, JoinRequest)
