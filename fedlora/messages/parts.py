"""An adapter as one vector with a manifest, named by a hash of its content; and who holds which.

A message carries its arrays joined into one, because Flower's cost is per array (448 arrays took 90 s a round where
one took 6). What a client already holds is named and not sent: a frozen A crosses the wire once, a residual once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256

import torch

from fedlora.jobs import Job, Update
from fedlora.lora import SIDES, LoRA
from fedlora.vectors import FlatAdapter, flatten


def job_hash(job: Job) -> str:
    """A name for a client's work: jobs with the same name have it do the same."""
    privacy = replace(job.privacy, known=0) if job.privacy else None
    told = {"start", "offset", "privacy", "masking"}  # a mask is another in every attempt at the same round
    plain = {f.name: getattr(job, f.name) for f in fields(job) if f.name not in told}
    parts = {where: flat.name for where, flat in Parts().of(job).items()}
    return sha256(repr((sorted(plain.items(), key=str), privacy, parts)).encode()).hexdigest()


class Parts:
    """The flat parts of jobs, each flattened once however many clients get it: sides of `start`, then the offset."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._made: dict[tuple[int, ...], tuple[LoRA, FlatAdapter]] = {}

    def of(self, job: Job) -> dict[str, FlatAdapter]:
        """Where each part belongs (`A`, `B`, `H`, `offset 0`, ...) and what it is."""
        sides = {s: self._flat(job.start.only(s), [id(t) for t in job.start.side(s).values()]) for s in SIDES}
        offset = {f"offset {i}": self._flat(p, [id(p)]) for i, p in enumerate(job.offset)}
        return {where: flat for where, flat in (sides | offset).items() if flat.vector.numel()}

    def _flat(self, lora: LoRA, key: Iterable[int]) -> FlatAdapter:
        key = tuple(key)
        if key not in self._made:
            self._made[key] = (lora, flatten(lora, self.dtype))  # holding the tensors keeps their ids their own
        return self._made[key][1]


def payload(update: Update) -> tuple[list[str], int]:
    """What an update brings across: its tensors by name, and bytes; numbers that are not packed count as float32."""
    if update.masked is not None:
        return ["masked"], 4 * update.masked.numel()
    names = [f"{s} {m}" for s, m, _ in update.lora.matrices()]
    return names, update.packed.nbytes if update.packed else 4 * update.lora.numel()


@dataclass
class PartTracker:
    """Bytes of adapters that crossed the wire, or would have, and what every client holds from its last job."""

    up: int = 0
    down: int = 0
    held: dict[int, frozenset[str]] = field(default_factory=dict)

    def send(self, client: int, parts: dict[str, FlatAdapter]) -> dict[str, FlatAdapter]:
        """The parts that the client does not hold yet, counted as sent."""
        missing = {w: f for w, f in parts.items() if f.name not in self.held.get(client, frozenset())}
        self.down += sum({f.name: f.nbytes for f in missing.values()}.values())
        self.held[client] = frozenset(f.name for f in parts.values())
        return missing

    def receive(self, update: Update) -> None:
        """Count an update."""
        self.up += payload(update)[1]
