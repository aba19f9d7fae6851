"""Jobs, updates and metrics as Flower records: a head of plain values, and at most one array.

Flower's cost is per array, so a message carries one vector. A job is made of parts (see `flat`), each named by a hash
of its content: the head names them all, and only those that the client lacks lie in the vector, one after another.
Nothing is pickled; whatever does not fit its head or its hash raises `WireError`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from flwr.app import ArrayRecord, RecordDict
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from .envelope import as_array, dtype_name, pack, read_head, read_vector, reading, text
from .errors import WireError
from .flat import Flat, count, flatten, name_of, unflatten
from .lora import SIDES, LoRA
from .metrics import Metrics
from .seat import size
from .strategy import Ask, Client, Job, Masking, Privacy, Spent, Training, Update

STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
Dtype = Literal["float32", "float64", "bfloat16", "float16", "int64", "int32"]
PLAIN = (  # of a Job
    *("trains", "shares", "sketch", "gain", "resumes", "example_clip", "privacy", "masking", "metrics"),
    *("training", "seed", "round", "rounds"),
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
    privacy: Privacy | None
    masking: Masking | None
    metrics: bool
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
    spent: Spent | None
    manifest: str  # of the vector; empty where it is masked
    dtype: Dtype


@checked(frozen=True, config=STRICT)
class MetricsHead:
    examples: int
    targets: int
    loss: float
    correct: int
    classes: int  # the vector is the confusion, row by row; 0: there is none
    dtype: Dtype = "int64"


@checked(frozen=True, config=STRICT)
class Lacks:
    """The answer of a client whose parts are lost: it wants the job in full."""

    lacks: tuple[str, ...]


@checked(frozen=True, config=STRICT)
class Said:
    """What a client says in a step of secure aggregation."""

    said: dict[str, str]


@dataclass(frozen=True, eq=False)
class Order:
    """A job as it arrived: which parts it is made of, and those that came with it."""

    head: JobHead
    sent: Mapping[str, Flat]  # by name

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


class Packer:
    """Packs the jobs of a round; what several clients lack is joined into a vector once."""

    def __init__(self) -> None:
        self._joined: dict[tuple[str, ...], ArrayRecord] = {}

    def job(self, job: Job, parts: Mapping[str, Flat], missing: Mapping[str, Flat]) -> RecordDict:
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


def read_order(records: RecordDict) -> Order:
    """The job that `Packer.job` packed. Raises `WireError`."""
    head = read_head(records, JobHead)
    vector = read_vector(records, head.dtype)
    with reading("a job"):
        sizes = [count(manifest) for _, manifest in head.sent]
        if sum(sizes) != vector.numel():
            raise WireError(f"a job's parts are {sum(sizes)} numbers by their manifests; {vector.numel()} came")
        ends = list(accumulate(sizes))
        pieces = [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        flats = [Flat(piece, manifest, name) for piece, (name, manifest) in zip(pieces, head.sent, strict=True)]
    for flat in flats:
        if name_of(flat.vector, flat.manifest) != flat.name:
            raise WireError(f"part {flat.name[:12]} of a job is not what its hash says: it was damaged on its way")
    return Order(head, {flat.name: flat for flat in flats})


def pack_update(update: Update) -> RecordDict:
    """An update; its numbers travel in the type they have."""
    if update.masked is not None:
        hidden = UpdateHead(update.examples, None, update.spent, "", "int32")
        return pack(hidden, as_array(update.masked))
    dtypes = {t.dtype for s in SIDES for t in update.lora.side(s).values()}
    flat = flatten(update.lora, dtypes.pop() if len(dtypes) == 1 else torch.float32)
    head = UpdateHead(update.examples, update.loss, update.spent, flat.manifest, dtype_name(flat.vector))
    return pack(head, as_array(flat.vector))


def read_update(records: RecordDict, job: Job) -> Update | Lacks:
    """The answer to a job: an update of the shapes that the job asked for, or that parts are lacking.

    Raises `WireError`: one client's nonsense must not reach `aggregate`, where it would end the run for all.
    """
    if _is_lacking(records):
        return read_head(records, Lacks)
    head = read_head(records, UpdateHead)
    vector = read_vector(records, head.dtype)
    if job.masking or not head.manifest:
        return _read_masked(head, vector, job)
    with reading("an update"):
        lora = unflatten(vector, head.manifest)
    free = {"A": 0, "B": 1} if job.resumes else {}  # the rank: a client that goes on from its own sends a change
    for s in SIDES:
        asked = _shapes(job.start.side(s) if s in job.shares else {}, free.get(s))
        got = _shapes(lora.side(s), free.get(s))
        if got != asked:
            raise WireError(f"an update's {s} is {got}; the job asked for {asked}")
    return Update(lora, head.examples, head.loss, head.spent)


def _read_masked(head: UpdateHead, vector: Tensor, job: Job) -> Update:
    if not job.masking or head.manifest or head.dtype != "int32" or vector.numel() != size(job):
        asked = f"a masked vector of {size(job)} numbers" if job.masking else "an update that is not masked"
        raise WireError(f"an update is {vector.numel()} numbers of {head.dtype}; the job asked for {asked}")
    return Update(LoRA(), head.examples, None, head.spent, vector)


def pack_ask(ask: Ask) -> RecordDict:
    """A step of secure aggregation."""
    return pack(ask)


def read_ask(records: RecordDict) -> Ask:
    """What `pack_ask` packed. Raises `WireError`."""
    return read_head(records, Ask)


def pack_said(said: Mapping[str, str]) -> RecordDict:
    """The answer to a step of secure aggregation."""
    return pack(Said(dict(said)))


def read_said(records: RecordDict) -> Mapping[str, str]:
    """What `pack_said` packed. Raises `WireError`."""
    return read_head(records, Said).said


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


def read_metrics(records: RecordDict) -> Metrics | Lacks:
    """The answer to a job that asked for an evaluation. Raises `WireError`."""
    if _is_lacking(records):
        return read_head(records, Lacks)
    head = read_head(records, MetricsHead)
    vector = read_vector(records, head.dtype)
    if vector.numel() != head.classes**2:
        raise WireError(f"metrics over {head.classes} classes came with {vector.numel()} counts")
    table = vector.view(head.classes, head.classes) if head.classes else None
    return Metrics(head.examples, head.targets, head.loss, head.correct, table)


def pack_lacks(lacks: Lacks) -> RecordDict:
    """That parts are neither in the message nor with the client."""
    return pack(lacks)


def pack_client(client: Client) -> RecordDict:
    """What a client says of itself."""
    return pack(client)


def read_client(records: RecordDict) -> Client:
    """What `pack_client` packed. Raises `WireError`."""
    return read_head(records, Client)


def _shapes(side: Mapping[str, Tensor], free: int | None = None) -> str:
    """The shapes in words, without the dimension that is free."""
    shown = {m: tuple(n for i, n in enumerate(t.shape) if i != free) for m, t in side.items()}
    return ", ".join(f"{m} {shape}" for m, shape in sorted(shown.items())) or "nothing"


def _is_lacking(records: RecordDict) -> bool:
    return text(records).startswith('{"lacks"')
