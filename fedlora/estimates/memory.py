"""The most memory that a run takes, from a few steps of it: first of one and two examples, then of a whole batch.

A step's tensors grow with the examples that it computes at once, so that two small steps tell what a large one takes
before it is tried. On a CPU a process has, beside its tensors, the libraries that it has loaded and what its allocator
holds of memory that is free again: the former is what this process has after its first step, the latter an allowance.
"""

from dataclasses import dataclass

import psutil
import torch

from fedlora.models.model import Model
from fedlora.run.delivery import ROOM

from .live_bytes import LiveBytes
from .probes import Probes

ALLOWANCE = 1.15  # of a step's tensors on a CPU: glibc held 0.96 to 1.26 times as much in steps that were measured


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory, of the device that computes; on a GPU of tensors alone."""

    begins: int  # with model and data loaded, and after a first small step
    base: int  # of these, the base model
    held: int  # of these, what the server holds between rounds
    serving: int  # more of the server, in its own work
    evaluating: int  # more of an evaluation
    alone: int  # more of a step of one client by itself
    step: int  # more of a step of all clients that the engine trains together; of a serial one the same
    checked: int  # the base a second time, when the adapter that was written is loaded afresh; 0: there is no room

    @property
    def client(self) -> int:
        """Most bytes of a client on a machine of its own."""
        return self.begins - self.held + max(self.alone, self.evaluating)

    @property
    def server(self) -> int:
        """Most bytes of a server on a machine of its own."""
        return self.begins + max(self.serving, self.evaluating, self.checked)

    @property
    def simulation(self) -> int:
        """Most bytes of a simulation, which is all of them in one process."""
        return self.begins + max(self.serving, self.step, self.evaluating, self.checked)


@dataclass(frozen=True)
class StepMemory:
    """The bytes of a step, by the clients and examples that it computes at once."""

    fixed: int
    per_row: int
    per_client: int = 0

    def of(self, *, rows: int, clients: int = 1) -> int:
        """The bytes of a step of so many examples, of so many clients."""
        return self.fixed + rows * self.per_row + (clients - 1) * self.per_client


def begins_with(model: Model) -> int:
    """Bytes that are taken now: of this process, or of tensors on the model's GPU."""
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device)
    return int(psutil.Process().memory_info().rss)


def base_bytes(model: Model) -> int:
    """Bytes of the base model's numbers."""
    return sum(t.numel() * t.element_size() for t in (*model.net.parameters(), *model.net.buffers()))


def allowance(model: Model) -> float:
    """What the bytes of tensors are multiplied by, for memory that an allocator holds."""
    return 1.0 if model.device.type == "cuda" else ALLOWANCE


def small_steps(probes: Probes, live: LiveBytes, *, alone: bool) -> StepMemory:
    """What steps of one and two examples, and of two clients with one each, say of a step of more."""
    one = probes.peak(live, rows=1, alone=alone)
    two = probes.peak(live, rows=2, alone=alone)
    if alone or len(probes.clients) < 2:
        return StepMemory(fixed=2 * one - two, per_row=two - one)
    pair = probes.peak(live, clients=2, rows=1)
    return StepMemory(fixed=2 * one - two, per_row=two - one, per_client=max(0, pair - two))


def room_for_a_second_base(base: int, room: int, begins: int) -> int:
    """Bytes of the base where there is room for it beside the first, as the check at a run's end asks; else 0."""
    return base if base * ROOM <= room - begins else 0
