"""An adapter as one vector with a manifest, named by a hash of its content; and who holds which.

A message carries its arrays joined into one, because Flower's cost is per array (448 arrays took 90 s a round where
one took 6). What a client already holds is named and not sent: a frozen A crosses the wire once, a residual once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256

import torch
from torch import Tensor

from .lora import SIDES, LoRA, from_matrices
from .strategy import Job, Update


@dataclass(frozen=True, eq=False)
class Flat:
    """A LoRA as one vector, and the manifest that says what lies where in it."""

    vector: Tensor  # (n,)
    manifest: str  # JSON: [[side, module, shape], ...] in the order of the vector
    name: str  # sha256 of type, manifest and bytes

    @property
    def nbytes(self) -> int:
        return self.vector.numel() * self.vector.element_size()


def flatten(lora: LoRA, dtype: torch.dtype = torch.float32) -> Flat:
    """The adapter as one vector, in the order of its sides and modules."""
    items = list(lora.matrices())
    manifest = json.dumps([[s, m, list(t.shape)] for s, m, t in items])
    vectors = [t.detach().reshape(-1).to("cpu", dtype) for _, _, t in items]
    vector = torch.cat(vectors) if vectors else torch.empty(0, dtype=dtype)
    return Flat(vector, manifest, name_of(vector, manifest))


def name_of(vector: Tensor, manifest: str) -> str:
    """The name of a flat adapter: a hash of its type, its manifest and its bytes."""
    digest = sha256(f"{vector.dtype}{manifest}".encode())
    digest.update(vector.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest(job: Job) -> str:
    """A name for a client's work: jobs with the same name have it do the same."""
    privacy = replace(job.privacy, known=0) if job.privacy else None
    told = {"start", "offset", "privacy", "masking"}  # a mask is another in every attempt at the same round
    plain = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in told}
    parts = {where: flat.name for where, flat in Parts().of(job).items()}
    return sha256(repr((sorted(plain.items(), key=str), privacy, parts)).encode()).hexdigest()


def count(manifest: str) -> int:
    """How many numbers a manifest names."""
    return sum(torch.Size(shape).numel() for _, _, shape in json.loads(manifest))


def unflatten(vector: Tensor, manifest: str) -> LoRA:
    """The adapter that `flatten` made a vector of, in the vector's own type."""
    entries = json.loads(manifest)
    sizes = [torch.Size(shape).numel() for _, _, shape in entries]
    if sum(sizes) != vector.numel():
        raise ValueError(f"the manifest names {sum(sizes)} numbers, the vector has {vector.numel()}")
    pieces = zip(entries, torch.split(vector, sizes), strict=True)
    return from_matrices((side, module, piece.view(shape)) for (side, module, shape), piece in pieces)


class Parts:
    """The flat parts of jobs, each flattened once however many clients get it: sides of `start`, then the offset."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._made: dict[tuple[int, ...], tuple[LoRA, Flat]] = {}

    def of(self, job: Job) -> dict[str, Flat]:
        """Where each part belongs (`A`, `B`, `H`, `offset 0`, ...) and what it is."""
        sides = {s: self._flat(job.start.only(s), [id(t) for t in job.start.side(s).values()]) for s in SIDES}
        offset = {f"offset {i}": self._flat(p, [id(p)]) for i, p in enumerate(job.offset)}
        return {where: flat for where, flat in (sides | offset).items() if flat.vector.numel()}

    def _flat(self, lora: LoRA, key: Iterable[int]) -> Flat:
        key = tuple(key)
        if key not in self._made:
            self._made[key] = (lora, flatten(lora, self.dtype))  # holding the tensors keeps their ids their own
        return self._made[key][1]


def carried(update: Update) -> tuple[list[str], int]:
    """What an update brings across: its tensors by name, and bytes; numbers that are not packed count as float32."""
    if update.masked is not None:
        return ["masked"], 4 * update.masked.numel()
    names = [f"{s} {m}" for s, m, _ in update.lora.matrices()]
    return names, update.packed.nbytes if update.packed else 4 * update.lora.numel()


@dataclass
class Traffic:
    """Bytes of adapters that crossed the wire, or would have, and what every client holds from its last job."""

    up: int = 0
    down: int = 0
    held: dict[int, frozenset[str]] = field(default_factory=dict)

    def send(self, client: int, parts: dict[str, Flat]) -> dict[str, Flat]:
        """The parts that the client does not hold yet, counted as sent."""
        missing = {w: f for w, f in parts.items() if f.name not in self.held.get(client, frozenset())}
        self.down += sum({f.name: f.nbytes for f in missing.values()}.values())
        self.held[client] = frozenset(f.name for f in parts.values())
        return missing

    def receive(self, update: Update) -> None:
        """Count an update."""
        self.up += carried(update)[1]
