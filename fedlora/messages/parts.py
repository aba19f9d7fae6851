"""The parts of jobs as bytes, each named by a hash of its content; and which client holds which.

A part is one side of a job's start, or one residual of its offset, as a safetensors file: few parts, because Flower's
cost is per array (448 arrays took 90 s a round where one took 6). A part that a client already holds is named and not
sent: a frozen A crosses the wire once, a residual once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256

import torch

from fedlora.jobs import Job, Update
from fedlora.lora import SIDES, LoRA, map_factors
from fedlora.tensors import by_name, from_bytes, number_bytes, to_adapter, to_bytes


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """An adapter as the bytes of a safetensors file."""

    content: bytes
    name: str  # `content_hash` the content

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers; those of the header are not counted."""
        return number_bytes(self.content)


def flatten(lora: LoRA, dtype: torch.dtype = torch.float32) -> FlatAdapter:
    """The adapter as bytes, its numbers in the given type."""
    content = to_bytes(by_name(map_factors(lambda t: t.detach().to("cpu", dtype), lora)))
    return FlatAdapter(content, content_hash(content))


def unflatten(content: bytes) -> LoRA:
    """The adapter that `flatten` made bytes of, in their own type. Raises `WireError`."""
    return to_adapter(from_bytes(content))


def content_hash(content: bytes) -> str:
    """The name of a part, by which a client knows that it holds it: SHA-256 of its bytes."""
    return sha256(content).hexdigest()


def job_hash(job: Job, start: Sequence[str], offset: Sequence[str]) -> str:
    """A name for a client's work, of the names of its parts: jobs with the same name have the client do the same.

    `start`, `offset`: names of the parts that the job's start and its offset are made of, in their order.
    """
    privacy = replace(job.privacy, known=0) if job.privacy else None
    apart = {"start", "offset", "privacy", "masking"}  # a mask is another in every attempt at the same round
    plain = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in apart}
    return sha256(repr((sorted(plain.items()), privacy, tuple(start), tuple(offset))).encode()).hexdigest()


class Parts:
    """The parts of jobs, each made once however many clients get it: the sides of `start`, then the offset."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._made: dict[tuple[int, ...], tuple[tuple[object, ...], FlatAdapter]] = {}

    def of(self, job: Job) -> dict[str, FlatAdapter]:
        """Where each part belongs (`A`, `B`, `H`, `offset 0`, ...) and what it is."""
        sides = {s: self._part(job.start.only(s), *job.start.side(s).values()) for s in SIDES}
        offset = {f"offset {i}": self._part(lora, lora) for i, lora in enumerate(job.offset)}
        return {where: part for where, part in (sides | offset).items() if part.nbytes}

    def _part(self, lora: LoRA, *known_by: object) -> FlatAdapter:
        """The adapter as a part; made once for the same objects, which are held so that their ids stay their own."""
        key = tuple(map(id, known_by))
        if key not in self._made:
            self._made[key] = (known_by, flatten(lora, self.dtype))
        return self._made[key][1]


def job_name(job: Job) -> str:
    """The `digest` of a job that no message brought, whose parts have no names yet."""
    return job_hash(job, *names(Parts().of(job)))


def names(parts: Mapping[str, FlatAdapter]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the parts that a job's start is made of, and of those that its offset is made of."""
    start = tuple(flat.name for where, flat in parts.items() if where in SIDES)
    return start, tuple(flat.name for where, flat in parts.items() if where not in SIDES)


def payload(update: Update) -> tuple[list[str], int]:
    """The tensors of an update by name, and their bytes; numbers that are not packed count as float32."""
    if update.masked is not None:
        return ["masked"], 4 * update.masked.numel()
    return list(by_name(update.lora)), update.packed.nbytes if update.packed else 4 * update.lora.numel()


@dataclass
class PartTracker:
    """Bytes of adapters that crossed the wire, or would have, and the parts that every client holds."""

    up: int = 0
    down: int = 0
    held: dict[int, frozenset[str]] = field(default_factory=dict)  # by client, since its last job

    def send(self, client: int, parts: dict[str, FlatAdapter]) -> dict[str, FlatAdapter]:
        """The parts that the client does not hold yet, counted as sent."""
        held = self.held.get(client, frozenset())
        missing = {where: flat for where, flat in parts.items() if flat.name not in held}
        self.down += sum({flat.name: flat.nbytes for flat in missing.values()}.values())
        self.held[client] = frozenset(flat.name for flat in parts.values())
        return missing

    def receive(self, update: Update) -> None:
        """Count an update."""
        self.up += payload(update)[1]
