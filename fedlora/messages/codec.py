"""Jobs, updates and metrics as Flower records: a head of plain values, and at most one array.

Flower's cost is per array, so a message carries one vector. A job is made of parts (see `flat`), each named by a hash
of its content: the head names them all, and only those that the client lacks lie in the vector, one after another.
Nothing is pickled; whatever does not fit its head or its hash raises `WireError`. What the server reads is in `admit`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from flwr.app import ArrayRecord, RecordDict
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from fedlora.errors import WireError
from fedlora.jobs import Client, CompressedUpdate, Job, MaskingTerms, PrivacySpent, PrivacyTerms, SecAggStep, Update
from fedlora.lora import LoRA
from fedlora.metrics import Metrics
from fedlora.sections import Encoding, Training
from fedlora.vectors import FlatAdapter, content_hash, count, flatten

from .envelope import as_array, dtype_name, pack, read_head, read_vector, reading, text

RUN = "[a-z0-9-]{0,40}"
STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
Dtype = Literal["float32", "float64", "bfloat16", "float16", "int64", "int32", "int8"]
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
    sent: tuple[tuple[str, str], ...]  # (name, manifest) of what lies in the vector, in its order
    dtype: Dtype


@checked(frozen=True, config=STRICT)
class UpdateHead:
    examples: int
    loss: float | None
    spent: PrivacySpent | None
    manifest: str  # of the vector; empty where it is masked
    dtype: Dtype
    name: str  # hash of the vector and the manifest
    round: int
    scales: int = 0  # of an int8 vector, float32 behind its numbers


@checked(frozen=True, config=STRICT)
class MetricsHead:
    examples: int
    targets: int
    loss: float
    correct: int
    classes: int  # the vector is the confusion, row by row; 0: there is none
    dtype: Dtype = "int64"


@checked(frozen=True, config=STRICT)
class JoinRequest:
    """The question who a client is, with what it is told of the run's settings."""

    settings: dict[str, int | float | str | bool]


@checked(frozen=True, config=STRICT)
class ClientInfo:
    client: Client
    base: str


@checked(frozen=True, config=STRICT)
class MissingParts:
    """The answer of a client whose parts are lost: it wants the job in full."""

    lacks: tuple[str, ...]


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
        head, start = self.head, LoRA()
        for name in head.start:
            start = start.over(parts[name])
        offset = tuple(parts[name] for name in head.offset)
        return Job(start=start, offset=offset, **{name: getattr(head, name) for name in PLAIN})


class JobEncoder:
    """Packs the jobs of a round; what several clients lack is joined into a vector once."""

    def __init__(self) -> None:
        self._joined: dict[tuple[str, ...], ArrayRecord] = {}

    def job(self, job: Job, parts: Mapping[str, FlatAdapter], missing: Mapping[str, FlatAdapter]) -> RecordDict:
        """The job with those parts that its client lacks."""
        sent = {flat.name: flat for flat in missing.values()}
        head = JobHead(
            **{name: getattr(job, name) for name in PLAIN},
            start=tuple(flat.name for where, flat in parts.items() if not where.startswith("offset")),
            offset=tuple(flat.name for where, flat in parts.items() if where.startswith("offset")),
            sent=tuple((flat.name, flat.manifest) for flat in sent.values()),
            dtype=dtype_name(next(iter(sent.values())).vector if sent else torch.empty(0)),
        )
        if sent and tuple(sent) not in self._joined:
            self._joined[tuple(sent)] = as_array(torch.cat([flat.vector for flat in sent.values()]))
        return pack(head, self._joined[tuple(sent)] if sent else None)


def read_order(records: RecordDict) -> IncomingJob:
    """The job that `Packer.job` packed. Raises `WireError`."""
    head = read_head(records, JobHead)
    vector = read_vector(records, head.dtype)
    with reading("a job"):
        sizes = [count(manifest) for _, manifest in head.sent]
        if sum(sizes) != vector.numel():
            raise WireError(f"a job's parts are {sum(sizes)} numbers by their manifests; {vector.numel()} came")
        ends = list(accumulate(sizes))
        pieces = [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        flats = [FlatAdapter(piece, manifest, name) for piece, (name, manifest) in zip(pieces, head.sent, strict=True)]
    for flat in flats:
        if content_hash(flat.vector, flat.manifest) != flat.name:
            raise WireError(f"part {flat.name[:12]} of a job is not what its hash says: it was damaged on its way")
    return IncomingJob(head, {flat.name: flat for flat in flats})


def pack_update(update: Update, round: int) -> RecordDict:
    """An update; its numbers travel in the type they have."""
    if update.masked is not None:
        name = content_hash(update.masked, "")
        hidden = UpdateHead(update.examples, None, update.spent, "", "int32", name, round)
        return pack(hidden, as_array(update.masked))
    if update.packed:
        return _pack_small(update, update.packed, round)
    dtypes = {t.dtype for _, _, t in update.lora.matrices()}
    flat = flatten(update.lora, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    told = update.examples, update.loss, update.spent, flat.manifest
    return pack(UpdateHead(*told, dtype_name(flat.vector), flat.name, round), as_array(flat.vector))


def _pack_small(update: Update, packed: CompressedUpdate, round: int) -> RecordDict:
    """A change in few bytes; scales travel in the one array, behind the numbers."""
    vector = torch.cat([packed.numbers, packed.scales.view(packed.numbers.dtype)])
    told = update.examples, update.loss, update.spent, packed.manifest, dtype_name(vector)
    return pack(UpdateHead(*told, content_hash(vector, packed.manifest), round, len(packed.scales)), as_array(vector))


def pack_ask(ask: SecAggStep) -> RecordDict:
    """A step of secure aggregation."""
    return pack(ask)


def read_ask(records: RecordDict) -> SecAggStep:
    """What `pack_ask` packed. Raises `WireError`."""
    return read_head(records, SecAggStep)


def pack_said(said: Mapping[str, str]) -> RecordDict:
    """The answer to a step of secure aggregation."""
    return pack(SecAggReply(dict(said)))


def pack_metrics(metrics: Metrics) -> RecordDict:
    """Metrics; the confusion of a classifier is the array."""
    table = metrics.confusion
    head = MetricsHead(
        examples=metrics.examples,
        targets=metrics.targets,
        loss=metrics.loss,
        correct=metrics.correct,
        classes=0 if table is None else len(table),
    )
    return pack(head, None if table is None else as_array(table.flatten()))


def pack_lacks(lacks: MissingParts) -> RecordDict:
    """That parts are neither in the message nor with the client."""
    return pack(lacks)


def pack_client(client: Client, base: str = "") -> RecordDict:
    """What a client says of itself, and the fingerprint of its base model."""
    return pack(ClientInfo(client, base))


def pack_hello(settings: Mapping[str, int | float | str | bool]) -> RecordDict:
    """The question who a client is."""
    return pack(JoinRequest(dict(settings)))


def read_hello(records: RecordDict) -> JoinRequest:
    """What `pack_hello` packed. Raises `WireError`."""
    return read_head(records, JoinRequest)


def stamp(records: RecordDict, run: str) -> RecordDict:
    """The message, marked with the run it belongs to: a client keeps what is its own by it."""
    records.config_records["head"]["run"] = run
    return records


def run_of(records: RecordDict) -> str:
    """The run that a message belongs to. Raises `WireError` where it says none, or what cannot be a folder's name."""
    text(records)
    run = records.config_records["head"].get("run", "")
    if not isinstance(run, str) or not re.fullmatch(RUN, run):
        said = repr(run[:40]) if isinstance(run, str) else f"a {type(run).__name__}"
        raise WireError(f"a message is of run {said}; a run's name has up to 40 of a-z, 0-9 and -")
    return run
