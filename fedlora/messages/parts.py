"""The parts of jobs as bytes, each named by a hash of its content; and which client holds which parts.

A part is one side of a job's start, or one residual of its offset, as a safetensors file. There are few, because Flower
charges by the array: 448 arrays took 90 s a round where one took 6. A part that a client already holds is named in a
job and not sent: a frozen A crosses the wire once, a residual once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from typing import Any

import torch

from fedlora.jobs import Job, Update
from fedlora.lora import SIDES, LoRA, map_factors
from fedlora.tensors import by_name, from_bytes, number_bytes, to_adapter, to_bytes

ALWAYS = (  # the fields of a Job that are in its hash whatever they are; newer ones are only where they are set
    *("trains", "shares", "sketch", "gain", "resumes", "example_clip", "overrides", "lr_factor", "privacy", "metrics"),
    *("upload", "feedback", "training", "seed", "round", "rounds"),
)
IN_PARTS = ("start", "offset", "right", "left", "correction")  # fields of a Job that travel as parts, each by its own
NEWER = ("loss", "regulariser")  # training settings that are in it only where they are set
APART = (*IN_PARTS, "masking")  # hashed as parts, or not at all


@dataclass(frozen=True, eq=False)
class FlatAdapter:
    """An adapter as the bytes of a safetensors file."""

    content: bytes
    name: str  # content_hash(content)

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers, without those of the header that names them."""
        return number_bytes(self.content)


def flatten(lora: LoRA, dtype: torch.dtype = torch.float32) -> FlatAdapter:
    """The adapter as bytes, with its numbers in the given type."""
    content = to_bytes(by_name(map_factors(lambda t: t.detach().to("cpu", dtype), lora)))
    return FlatAdapter(content, content_hash(content))


def unflatten(content: bytes) -> LoRA:
    """The adapter that `flatten` wrote, in the type in which it was written. Raises `WireError`."""
    return to_adapter(from_bytes(content))


def content_hash(content: bytes) -> str:
    """SHA-256 of the bytes, in hexadecimal: the name by which a client knows that it holds a part."""
    return sha256(content).hexdigest()


def job_hash(job: Job, *, start: Sequence[str], offset: Sequence[str], **later: Sequence[str]) -> str:
    """A hash of the work that a job asks for: jobs with the same hash have the client do the same.

    `start`, `offset` and the others are the names of the parts of these fields, in their order (see `part_names`).
    What may differ between two attempts at the same round is left out: the mask, and how many charges the server knows.
    A job has the hash that older versions gave it, by which a ledger may have charged it, unless it sets a newer field.
    """
    others = [(name, tuple(names)) for name, names in sorted(later.items()) if names]
    asked = sorted(_asked(job).items())
    return sha256(repr((asked, tuple(start), tuple(offset), *others)).encode()).hexdigest()


def _asked(job: Job) -> dict[str, Any]:
    """The fields of a job that its hash is made of, but for those that travel as parts."""
    untouched = Job(job.start)
    named = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in APART}
    asked = {name: value for name, value in named.items() if name in ALWAYS or value != getattr(untouched, name)}
    asked["training"] = {key: value for key, value in asdict(job.training).items() if value or key not in NEWER}
    asked["privacy"] = job.privacy and asdict(job.privacy) | {"known": 0}
    return asked


def hash_parts_and_job(job: Job) -> str:
    """The `job_hash` of a job that came in no message, so that its parts have to be hashed here."""
    return job_hash(job, **part_names(Parts().of(job)))


class Parts:
    """The parts of jobs. Each is made once, however many clients get it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._made: dict[tuple[int, ...], tuple[tuple[object, ...], FlatAdapter]] = {}

    def of(self, job: Job) -> dict[str, FlatAdapter]:
        """The parts of a job by where they belong: the sides of the start (`A`, `B`, `H`, ...), then `offset 0`, ...

        Then come `right` and `left`, where the job asks for a projection, and `correction`, where it has one.
        """
        sides = {s: self._part(job.start.only(s), *job.start.side(s).values()) for s in SIDES}
        offset = {f"offset {i}": self._part(lora, lora) for i, lora in enumerate(job.offset)}
        others = {
            "right": self._part(LoRA(A=job.right), *job.right.values()),
            "left": self._part(LoRA(B=job.left), *job.left.values()),
            "correction": self._part(job.correction, *(t for _, _, t in job.correction.matrices())),
        }
        return {where: part for where, part in (sides | offset | others).items() if part.nbytes}

    def _part(self, lora: LoRA, *objects: object) -> FlatAdapter:
        """The adapter as a part, made once for the same objects. These are kept, so that no others have their ids."""
        key = tuple(map(id, objects))
        if key not in self._made:
            self._made[key] = (objects, flatten(lora, self.dtype))
        return self._made[key][1]


def part_names(parts: Mapping[str, FlatAdapter]) -> dict[str, tuple[str, ...]]:
    """The names of the parts that each field of a job is made of, by the fields in `IN_PARTS`."""
    names: dict[str, tuple[str, ...]] = dict.fromkeys(IN_PARTS, ())
    for where, part in parts.items():
        field_name = "start" if where in SIDES else where.partition(" ")[0]
        names[field_name] += (part.name,)
    return names


def payload(update: Update) -> tuple[list[str], int]:
    """The names of an update's tensors, and their bytes; numbers that are not compressed count as float32."""
    if update.masked is not None:
        return ["masked"], 4 * update.masked.numel()
    return list(by_name(update.lora)), update.packed.nbytes if update.packed else 4 * update.lora.numel()


@dataclass
class PartTracker:
    """The bytes of adapters that crossed the wire, or would have, and the parts that every client holds."""

    up: int = 0
    down: int = 0
    held: dict[int, frozenset[str]] = field(default_factory=dict)  # client -> names of the parts of its last job

    def send(self, client: int, parts: Mapping[str, FlatAdapter]) -> dict[str, FlatAdapter]:
        """Count as sent, and return, the parts that the client does not hold yet."""
        held = self.held.get(client, frozenset())
        missing = {where: part for where, part in parts.items() if part.name not in held}
        self.down += sum({part.name: part.nbytes for part in missing.values()}.values())
        self.held[client] = frozenset(part.name for part in parts.values())
        return missing

    def receive(self, update: Update) -> None:
        """Count an update as received."""
        self.up += payload(update)[1]
