"""What an upload must be before it reaches a strategy: one client's nonsense is that client's failure, and no more.

Checked are size, head, hash, names, shapes, type, finiteness, the norm of what changed, and the round; whatever does
not hold raises `WireError`, in words that name what came and what was asked for. Nothing is unpickled.
"""

import json
from collections.abc import Mapping
from math import hypot, inf, isfinite, isnan, prod
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedlora.errors import WireError
from fedlora.jobs import Client, CompressedUpdate, Job, Update
from fedlora.lora import SIDES, LoRA, difference, euclidean_norm, norm
from fedlora.messages.codec import ClientInfo, MetricsHead, MissingParts, SecAggReply, UpdateHead
from fedlora.messages.compression import restore
from fedlora.messages.envelope import read_head, read_vector, reading, text
from fedlora.metrics import Metrics
from fedlora.privacy.masked_update import size
from fedlora.vectors import content_hash, unflatten

MOST_HEAD = 8 * 2**20  # characters of a head
PLAIN_HEAD = 2**16  # of one without a manifest
MOST_COMMAS = 2**17  # in a head: each may part values that are all wrong, at 200 bytes and 10 us an error
MOST_METRICS = 64 * 2**20  # bytes of counts: 2896 classes by as many
MOST_EXAMPLES = 10**12
MOST_RANK = 2**20
NPY = 1024  # bytes of numpy's own header, generously
KEYS = {"json", "run"}  # of the record that is a head
FLOATS = ("float32", "float64", "bfloat16", "float16")


@reading("an update")
def validated_update(records: RecordDict, job: Job, largest_step: float = inf) -> Update | MissingParts:
    """The answer to a job: an update of the shapes that the job asked for, or that parts are lacking.

    `largest_step`: norm of what the client changed, over all that it sends, above which it is refused.
    """
    _bounded(records, most_bytes(job), _most_characters(job))
    if _is_lacking(records):
        return _read_lacks(records)
    head = read_head(records, UpdateHead)
    _plausible(head, job)
    vector = read_vector(records, head.dtype)
    if content_hash(vector, head.manifest) != head.name:
        raise WireError(f"an update is not what its hash {head.name[:12]!r} says: it was damaged on its way")
    if job.masking or not head.manifest:
        return _read_masked(head, vector, job)
    lora, packed = _small(head, vector, job) if job.upload != "float32" else (_plain(head, vector), None)
    _of_the_shapes(lora, job)
    _finite(lora)
    step = update_norm(lora, job)
    if not step <= largest_step:
        raise WireError(f"an update's change has norm {step:.4g}; server.largest_step = {largest_step:g}")
    return Update(lora, head.examples, head.loss, head.spent, packed)


@reading("metrics")
def read_metrics(records: RecordDict, job: Job | None = None) -> Metrics | MissingParts:
    """The answer to a job that asked for an evaluation."""
    _bounded(records, MOST_METRICS, _most_characters(job) if job else MOST_HEAD)
    if _is_lacking(records):
        return _read_lacks(records)
    head = read_head(records, MetricsHead)
    counts = head.examples, head.targets, head.correct, head.classes
    if not (not isnan(head.loss) and all(0 <= n <= MOST_EXAMPLES for n in counts) and head.correct <= head.targets):
        raise WireError(f"metrics are not possible: loss {head.loss}, {head.correct} of {head.targets} right")
    vector = read_vector(records, head.dtype)
    if vector.dtype != torch.int64 or vector.numel() != head.classes**2 or bool((vector < 0).any()):
        raise WireError(f"metrics over {head.classes} classes came with {vector.numel()} counts")
    table = vector.view(head.classes, head.classes) if head.classes else None
    return Metrics(head.examples, head.targets, head.loss, head.correct, table)


@reading("an introduction")
def read_client(records: RecordDict) -> tuple[Client, str]:
    """What a client says of itself, and the fingerprint of its base model."""
    _bounded(records, None, PLAIN_HEAD)
    said = read_head(records, ClientInfo)
    client, counts = said.client, (said.client.examples, said.client.records)
    if not (0 <= client.id < 2**31 and 1 <= client.rank <= MOST_RANK and all(0 <= n <= MOST_EXAMPLES for n in counts)):
        raise WireError(f"a client says what cannot be: {client}")
    return client, said.base[:64]


@reading("an answer")
def read_said(records: RecordDict) -> Mapping[str, str]:
    """The answer to a step of secure aggregation."""
    _bounded(records, None)
    return read_head(records, SecAggReply).said


def update_norm(lora: LoRA, job: Job) -> float:
    """The norm of what a client changed: of all the numbers it sends, or of a product where it sends its change."""
    if not job.resumes:
        return euclidean_norm(difference(lora, job.start))
    return hypot(norm(lora.only("AB")), euclidean_norm(difference(lora.only("HRD"), job.start)))


def _bounded(records: RecordDict, most: int | None, characters: int = MOST_HEAD) -> None:
    """Refuse what is too large or was not asked for, before any of it is decoded; `most` None: no array."""
    head = text(records)
    known = {"head", "array"} if most is not None else {"head"}
    arrays = {name: r for name, r in records.items() if isinstance(r, ArrayRecord)}
    more = [*({*records} - known), *({*records} - {"head", *arrays}), *({*records.config_records["head"]} - KEYS)]
    if more:
        raise WireError(f"a message has more than was asked for: {', '.join(sorted(more))}")
    nbytes = sum(len(a.data) for record in arrays.values() for a in record.values())
    if nbytes > (most or 0) + NPY:
        raise WireError(f"a message brings {nbytes} bytes of numbers; at most {most} were asked for")
    if len(head) > characters or head.count(",") > MOST_COMMAS:
        found, most_of = (len(head), head.count(",")), (characters, MOST_COMMAS)
        raise WireError(f"a message's head has {found} characters and commas; {most_of} are the most")


def most_bytes(job: Job) -> int:
    """The largest answer that a job can have, in float64; one that resumes sends up to twice the rank."""
    numbers = job.start.only(job.shares).numel()
    return 4 * size(job) if job.masking else 8 * numbers * (2 if job.resumes else 1)


def _most_characters(job: Job) -> int:
    """The longest head of an answer: a manifest within JSON, each name in escapes, or the names of all parts."""
    names = sum(8 * len(m) + 200 for s in job.shares for m in job.start.side(s))
    return min(MOST_HEAD, PLAIN_HEAD + names + 100 * len(job.offset))


def _plausible(head: UpdateHead, job: Job) -> None:
    if head.round != job.round:
        which = head.round + 1 if 0 <= head.round <= MOST_EXAMPLES else "no number"  # Python writes 4300 digits at most
        raise WireError(f"an update is of round {which}; the job was of round {job.round + 1}")
    if not 0 <= head.examples <= MOST_EXAMPLES:
        raise WireError(f"an update is from {head.examples} examples; 0 to {MOST_EXAMPLES} are possible")
    if head.loss is not None and not isfinite(head.loss):
        raise WireError(f"an update's loss is {head.loss}")
    if head.spent and not job.privacy:
        raise WireError("an update says what it spent; the job was not a private one")
    if head.spent and not (head.spent.epsilon >= 0 and 0 <= head.spent.charges <= MOST_EXAMPLES):
        raise WireError(f"an update's spending is not possible: {head.spent}")


def _plain(head: UpdateHead, vector: Tensor) -> LoRA:
    if head.dtype not in FLOATS or head.scales:
        raise WireError(f"an update is of {head.dtype}; it takes one of {', '.join(FLOATS)}")
    return unflatten(vector, _manifest(head.manifest, vector.numel()))


def _small(head: UpdateHead, vector: Tensor, job: Job) -> tuple[LoRA, CompressedUpdate]:
    """A change in few bytes, and what it makes of where the job started."""
    n = vector.numel() - 4 * head.scales
    if head.dtype != job.upload or head.scales < 0 or n < 0 or (head.scales and job.upload != "int8"):
        raise WireError(f"an update is of {head.dtype} with {head.scales} scales; the job asked for {job.upload}")
    scales = vector[n:].clone().view(torch.float32) if head.scales else torch.empty(0)
    packed = CompressedUpdate(job.upload, vector[:n], scales, _manifest(head.manifest, n))
    return restore(job.start, packed), packed


def _manifest(manifest: str, numbers: int) -> str:
    """The manifest, if it is one, and of so many numbers."""
    try:
        entries: Any = json.loads(manifest)
        good = isinstance(entries, list) and all(_entry(*e) for e in entries)
        places = {(side, module) for side, module, _ in entries} if good else set()
    except (ValueError, TypeError, RecursionError):
        good = False
    if not good or len(places) != len(entries):
        raise WireError(f"an update's manifest is none: {manifest[:80]!r}")
    total = sum(prod(shape) for _, _, shape in entries)  # torch's own count of them wraps at 2**64
    if total != numbers:
        raise WireError(f"an update's manifest names {total} numbers; {numbers} came")
    return manifest


def _entry(side: Any, module: Any, shape: Any) -> bool:
    """Is this an entry of a manifest?"""
    whole = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    return whole and isinstance(module, str) and side in tuple(SIDES)


def _of_the_shapes(lora: LoRA, job: Job) -> None:
    """Refuse other names and shapes than the job's; only the rank is free, where a client sends a change of product."""
    free = {"A": 0, "B": 1} if job.resumes else {}
    for s in SIDES:
        asked = _shapes(job.start.side(s) if s in job.shares else {}, free.get(s))
        got = _shapes(lora.side(s), free.get(s))
        if got != asked:
            other = {m: shape for m, shape in got.items() if asked.get(m) != shape}
            lacking = {m: shape for m, shape in asked.items() if got.get(m) != shape}
            raise WireError(f"an update's {s} is {_words(other)}; the job asked for {_words(lacking)}")
    for m, a in lora.A.items() if job.resumes else ():
        rank = len(a)
        if m not in lora.B or lora.B[m].shape[1] != rank or rank > 2 * len(job.start.A[m]):
            raise WireError(f"an update's A and B of {m} do not go together, or are of more than twice the job's rank")


def _finite(lora: LoRA) -> None:
    for s, m, t in lora.matrices():
        if not bool(torch.isfinite(t).all()):
            raise WireError(f"an update's {s} of {m} has a number that is not finite")


def _read_masked(head: UpdateHead, vector: Tensor, job: Job) -> Update:
    if not job.masking or head.manifest or head.dtype != "int32" or head.scales or vector.numel() != size(job):
        asked = f"a masked vector of {size(job)} numbers" if job.masking else "an update that is not masked"
        raise WireError(f"an update is {vector.numel()} numbers of {head.dtype}; the job asked for {asked}")
    return Update(LoRA(), head.examples, None, head.spent, masked=vector)


def _read_lacks(records: RecordDict) -> MissingParts:
    lacks = read_head(records, MissingParts)
    if records.array_records:
        raise WireError("a message that parts are lacking has numbers; it takes their names alone")
    if not lacks.lacks or len(lacks.lacks) > 10**5:
        raise WireError(f"a client lacks {len(lacks.lacks)} parts; it takes one or more")
    return lacks


def _shapes(side: Mapping[str, Tensor], free: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes by module, without the dimension that is free."""
    return {m: tuple(n for i, n in enumerate(t.shape) if i != free) for m, t in side.items()}


def _words(shapes: Mapping[str, tuple[int, ...]], most: int = 3) -> str:
    some = [f"{m} {shape}" for m, shape in sorted(shapes.items())]
    more = f" and {len(some) - most} more" if len(some) > most else ""
    return ", ".join(some[:most]) + more or "nothing"


def _is_lacking(records: RecordDict) -> bool:
    return text(records).startswith('{"lacks"')
