"""The parts of jobs as bytes, each named by a hash of its content; and which client holds which parts.

A part is one side of a job's start, or one residual of its offset, as a safetensors file. There are few, because Flower
charges by the array: 448 arrays took 90 s a round where one took 6. A part that a client already holds is named in a
job and not sent: a frozen A crosses the wire once, a residual once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256

import torch

from fedlora.jobs import Job, Update
from fedlora.lora import SIDES, LoRA, map_factors
from fedlora.tensors import by_name, from_bytes, number_bytes, to_adapter, to_bytes


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


def job_hash(job: Job, *, start: Sequence[str], offset: Sequence[str]) -> str:
    """A hash of the work that a job asks for: jobs with the same hash have the client do the same.

    `start` and `offset` are the names of the parts that the job's start and its offset are made of, in their order.
    What may differ between two attempts at the same round is left out: the mask, and how many charges the server knows.
    """
    asked = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in ("start", "offset", "masking")}
    asked["training"] = asdict(job.training)
    asked["privacy"] = job.privacy and asdict(job.privacy) | {"known": 0}
    return sha256(repr((sorted(asked.items()), tuple(start), tuple(offset))).encode()).hexdigest()


def hash_parts_and_job(job: Job) -> str:
    """The `job_hash` of a job that came in no message, so that its parts have to be hashed here."""
    start, offset = part_names(Parts().of(job))
    return job_hash(job, start=start, offset=offset)


class Parts:
    """The parts of jobs. Each is made once, however many clients get it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._made: dict[tuple[int, ...], tuple[tuple[object, ...], FlatAdapter]] = {}

    def of(self, job: Job) -> dict[str, FlatAdapter]:
        """The parts of a job by where they belong: the sides of the start (`A`, `B`, `H`, ...), then `offset 0`, ..."""
        sides = {s: self._part(job.start.only(s), *job.start.side(s).values()) for s in SIDES}
        offset = {f"offset {i}": self._part(lora, lora) for i, lora in enumerate(job.offset)}
        return {where: part for where, part in (sides | offset).items() if part.nbytes}

    def _part(self, lora: LoRA, *objects: object) -> FlatAdapter:
        """The adapter as a part, made once for the same objects. These are kept, so that no others have their ids."""
        key = tuple(map(id, objects))
        if key not in self._made:
            self._made[key] = (objects, flatten(lora, self.dtype))
        return self._made[key][1]


def part_names(parts: Mapping[str, FlatAdapter]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the parts that a job's start is made of, and of those that its offset is made of."""
    start = tuple(part.name for where, part in parts.items() if where in SIDES)
    offset = tuple(part.name for where, part in parts.items() if where not in SIDES)
    return start, offset


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
