"""Checks of what clients send, before it reaches a strategy: one client's nonsense is that client's failure alone.

Checked are size, head, hash, names, shapes, type, finiteness, the norm of what changed, and the round; whatever does
not hold raises `WireError`, in words that name what came and what was asked for. Nothing is unpickled.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import WireError
from fedlora.jobs import Client, CompressedUpdate, Job, Update, shared_start
from fedlora.lora import SIDES, LoRA, at_least_float32, map_factors
from fedlora.message_types import ClientInfo, MetricsHead, MissingParts, SecAggReply, UpdateHead
from fedlora.messages.codec import MASKED, SCALES, is_table
from fedlora.messages.compression import restore
from fedlora.messages.envelope import RawMessage, read_either, read_head, reading
from fedlora.messages.parts import IN_PARTS, content_hash
from fedlora.metrics import Metrics
from fedlora.privacy.masked_update import size
from fedlora.server.step_limits import check_norm, update_norm
from fedlora.tensors import forms, from_bytes, to_adapter

MOST_HEAD = 2**16  # characters of a head, but for names of parts
MOST_SAID = 8 * 2**20  # of one that has other members' shares in it
MOST_COMMAS = 2**17  # in a head: each may part values that are all wrong, at 200 bytes and 10 us an error
MOST_METRICS = 64 * 2**20  # bytes of a table: the counts of 2896 classes by as many
FLOATS = "float32", "float64", "bfloat16", "float16"
Shapes = Mapping[str, tuple[int, ...]]


@reading("an update")
def validated_update(message: RawMessage, job: Job, largest_step: float = inf) -> Update | MissingParts:
    """The answer to a job: an update of the shapes that the job asked for, or that parts are lacking.

    `largest_step`: norm of what the client changed, over all that it sends, above which it is refused.
    """
    _check_size(message, most_bytes(job), _most_characters(job))
    head = read_either(message, UpdateHead, MissingParts)
    if isinstance(head, MissingParts):
        return _checked_missing(head, message)
    _check_head(head, job)
    content = message.numbers or b""
    if content_hash(content) != head.name:
        raise WireError(f"an update is not what its hash {head.name[:12]!r} says: it was damaged on its way")
    tensors = from_bytes(content, _most_header(job))
    if job.masking:
        return Update(LoRA(), head.examples, None, head.spent, masked=_masked(tensors, job))
    lora, packed = _plain(tensors, job) if job.upload == "float32" else _small(tensors, job)
    lora = _in_the_types(lora, job)
    _check_finite(lora)
    check_norm(update_norm(lora, job), largest_step)
    return Update(lora, head.examples, head.loss, head.spent, packed)


@reading("metrics")
def read_metrics(message: RawMessage, job: Job | None = None) -> Metrics | MissingParts:
    """The answer to a job that asked for an evaluation: metrics, or that parts are lacking."""
    _check_size(message, MOST_METRICS, _most_characters(job) if job else MOST_HEAD)
    head = read_either(message, MetricsHead, MissingParts)
    if isinstance(head, MissingParts):
        return _checked_missing(head, message)
    tables: dict[str, Any] = {} if message.numbers is None else {**_tables(message.numbers)}
    return Metrics(head.examples, head.targets, head.loss, head.correct, **tables)


@reading("an introduction")
def read_client(message: RawMessage) -> tuple[Client, str]:
    """What a client says of itself, and the fingerprint of its base model."""
    _check_size(message, 0, MOST_HEAD)
    said = read_head(message, ClientInfo)
    return said.client, said.base


@reading("an answer")
def read_secagg_reply(message: RawMessage) -> Mapping[str, str]:
    """The answer to a step of secure aggregation."""
    _check_size(message, 0, MOST_SAID)
    return read_head(message, SecAggReply).said


def most_bytes(job: Job) -> int:
    """The largest answer that a job can have, in float64; one that resumes sends up to twice the rank."""
    numbers = shared_start(job).numel()
    return _most_header(job) + (4 * size(job) if job.masking else 8 * numbers * (2 if job.resumes else 1))


def _most_header(job: Job) -> int:
    """The longest header of an answer's numbers: a tensor, and one for its scales, with their names in escapes."""
    return 2**16 + 2 * sum(8 * len(m) + 200 for _, m, _ in shared_start(job).matrices())


def _most_characters(job: Job) -> int:
    """The longest head of an answer: one that names every part of the job."""
    return MOST_HEAD + 100 * (len(SIDES) + len(job.offset) + len(IN_PARTS))


def _check_size(message: RawMessage, most: int, characters: int) -> None:
    """Refuse a message that is too large, before any of it is parsed; `most` 0: it is to have no array."""
    if message.numbers is not None and (not most or len(message.numbers) > most):
        raise WireError(f"a message brings {len(message.numbers)} bytes of numbers; at most {most} were asked for")
    found = len(message.head), message.head.count(",")
    allowed = characters, MOST_COMMAS
    if found[0] > characters or found[1] > MOST_COMMAS:
        raise WireError(f"a message's head has {found} characters and commas; {allowed} are the most")


def _check_head(head: UpdateHead, job: Job) -> None:
    """Refuse what a client says of its update that does not belong to the job."""
    if head.round != job.round:
        raise WireError(f"an update is of round {head.round + 1}; the job was of round {job.round + 1}")
    if head.spent and not job.privacy:
        raise WireError("an update says what it spent; the job was not a private one")


def _masked(tensors: Mapping[str, Tensor], job: Job) -> Tensor:
    """The one vector of a masked update: (n,) int32."""
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    if found != {MASKED: (torch.int32, (size(job),))}:
        raise WireError(f"an update is {_words(tensors)}; the job asked for a masked vector of {size(job)} numbers")
    return tensors[MASKED]


def _plain(tensors: Mapping[str, Tensor], job: Job) -> tuple[LoRA, None]:
    """The matrices of an update, in the job's order."""
    _check_types(tensors, FLOATS)
    return _of_the_shapes(to_adapter(tensors), job), None


def _small(tensors: Mapping[str, Tensor], job: Job) -> tuple[LoRA, CompressedUpdate]:
    """A change in few bytes, and what it makes of where the job started."""
    scales = {name: t for name, t in tensors.items() if name.startswith(SCALES)}
    numbers = {name: t for name, t in tensors.items() if name not in scales}
    _check_types(numbers, (job.upload,))
    matrices = _of_the_shapes(to_adapter(numbers), job)
    of_rows = to_adapter({name.removeprefix(SCALES): t for name, t in scales.items()})
    packed = CompressedUpdate(job.upload, matrices, of_rows)
    return restore(shared_start(job), packed), packed


def _check_types(tensors: Mapping[str, Tensor], allowed: Sequence[str]) -> None:
    for name, t in tensors.items():
        if _dtype(t) not in allowed:
            raise WireError(f"an update is of {_dtype(t)} in {name}; the job asked for {' or '.join(allowed)}")


def _of_the_shapes(lora: LoRA, job: Job) -> LoRA:
    """The matrices in the job's order, if there are those that the job asked for, in its shapes.

    Only the rank is free, where a client sends a change of the product: up to twice the job's.
    """
    free = {"A": 0, "B": 1} if job.resumes else {}
    asked = shared_start(job)
    for s in SIDES:
        _check_shapes(s, _shapes(lora.side(s), free.get(s)), _shapes(asked.side(s), free.get(s)))
    if job.resumes:
        _check_ranks(lora, job)
    return map_factors(lambda _, sent: sent, asked, lora)


def _in_the_types(lora: LoRA, job: Job) -> LoRA:
    """The matrices in the types that the job's have: what a client sends in float64 makes no state of float64."""
    return map_factors(lambda sent, start: sent.to(at_least_float32(start).dtype), lora, shared_start(job))


def _check_shapes(side: str, found: Shapes, asked: Shapes) -> None:
    if found != asked:
        other, missing = _listed(_without(found, asked)), _listed(_without(asked, found))
        raise WireError(f"an update's {side} is {other}; the job asked for {missing}")


def _without(shapes: Shapes, others: Shapes) -> Shapes:
    """The shapes that are not among the others."""
    return {m: shape for m, shape in shapes.items() if others.get(m) != shape}


def _check_ranks(lora: LoRA, job: Job) -> None:
    """Refuse factors of a product that do not go together."""
    for m, a in lora.A.items():
        if m not in lora.B or lora.B[m].shape[1] != len(a) or len(a) > 2 * len(job.start.A[m]):
            raise WireError(f"an update's A and B of {m} do not go together, or are of more than twice the job's rank")


def _check_finite(lora: LoRA) -> None:
    for s, m, t in lora.matrices():
        if not bool(torch.isfinite(t).all()):
            raise WireError(f"an update's {s} of {m} has a number that is not finite")


def _tables(content: bytes) -> dict[str, Tensor]:
    """The table of sums that metrics bring, by the name of its field."""
    tensors = from_bytes(content, MOST_HEAD)
    found = forms(content)
    if len(found) != 1 or not all(is_table(name, dtype, shape) for name, (dtype, shape) in found.items()):
        raise WireError(
            f"metrics came with {_words(tensors)}; they take the counts of a classifier or of several labels, or the "
            "sums of a regression or of preferences"
        )
    for name, table in tensors.items():
        if table.is_floating_point() and not bool(torch.isfinite(table).all()):
            raise WireError(f"metrics came with a number in {name} that is not finite")
        if not table.is_floating_point() and bool((table < 0).any()):
            raise WireError("metrics came with a count below zero")
    return tensors


def _checked_missing(head: MissingParts, message: RawMessage) -> MissingParts:
    if message.numbers is not None:
        raise WireError("a message that parts are lacking has numbers; it takes their names alone")
    return head


def _shapes(side: Mapping[str, Tensor], free: int | None = None) -> Shapes:
    """The shapes by module, without the dimension that is free."""
    return {m: tuple(n for i, n in enumerate(t.shape) if i != free) for m, t in side.items()}


def _listed(shapes: Shapes, most: int = 3) -> str:
    """The first of these shapes, in words."""
    shown = [f"{m} {shape}" for m, shape in sorted(shapes.items())]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more or "nothing"


def _words(tensors: Mapping[str, Tensor]) -> str:
    return _listed({f"{_dtype(t)} {name}": tuple(t.shape) for name, t in tensors.items()})


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
