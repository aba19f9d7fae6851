"""What is refused for want of memory, and what would fit instead."""

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil, prod
from pathlib import Path

from fedlora.config import Config
from fedlora.errors import MemoryShort
from fedlora.models.base_model import model_files

from .memory import StepMemory
from .room import words

LIBRARIES = 400e6  # bytes of a process that has loaded torch, transformers and PEFT, about
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.05, "4bit": 0.6}  # of a number of the base, about


@dataclass(frozen=True, kw_only=True, eq=False)
class Needs:
    """What small steps say that a run needs, in bytes."""

    begins: int  # with model and data loaded
    base: int  # of these, the base model
    rows: int  # examples that a step computes at once
    clients: int  # that train in it
    step: StepMemory
    serving: int  # of the server, beside its held state
    allowance: float  # what the bytes of a step are multiplied by

    def of(self, *, rows: int | None = None, clients: int | None = None, base: float = 1.0, width: float = 1.0) -> int:
        """Bytes in all, with other counts in a step, with the base and what it computes so many times as large."""
        rows, clients = rows or self.rows, clients or self.clients
        step = self.step.fixed + rows * self.step.per_row * width + (clients - 1) * self.step.per_client
        return int(self.begins - (1 - base) * self.base + max(self.allowance * step, self.serving))


def refuse_large_base(config: Config, most: int) -> None:
    """Raise `MemoryShort` where the base model's files alone say that it does not fit; nothing is loaded for that."""
    numbers = sum(map(_numbers, model_files(config.model.path)))
    now = _kind(config)
    if LIBRARIES + BYTES[now] * numbers <= most:
        return
    others = [kind for kind in _kinds(config) if LIBRARIES + BYTES[kind] * numbers <= most]
    fits = f"a model of at most {max(0.0, most - LIBRARIES) / BYTES[now] / 1e6:,.0f} M numbers"
    told = [f"{_setting(kind)} ({words(BYTES[kind] * numbers)})" for kind in others]
    raise MemoryShort(
        f"the base model has {numbers / 1e6:,.0f} M numbers, {words(BYTES[now] * numbers)} in {now} beside "
        f"{words(LIBRARIES)} of libraries, and there are {words(most)}; what fits: {', or '.join([*told, fits])}"
    )


def refuse_what_does_not_fit(needs: Needs, config: Config, most: int) -> None:
    """Raise `MemoryShort` for a run that needs more memory than there is, and say what would fit."""
    if needs.of() <= most:
        return
    remedies = [*_remedies(needs, config, most)] or ["a smaller model, or a machine with more memory"]
    raise MemoryShort(
        f"this run takes about {words(needs.of())} and there are {words(most)}: {words(needs.begins)} with model and "
        f"data loaded, {words(needs.of() - needs.begins)} for a step of {needs.rows} examples; what fits: "
        f"{', or '.join(remedies)}"
    )


def _remedies(needs: Needs, config: Config, most: int) -> Iterator[str]:
    """Yield each change of one setting by which the run would fit."""
    yield from _fewer_at_once(needs, config, most)
    if needs.of(width=0.5) <= most:
        yield f"model.max_length = {config.model.max_length // 2} (about {words(needs.of(width=0.5))})"
    now = BYTES[_kind(config)]
    for kind in _kinds(config):
        smaller = needs.of(base=BYTES[kind] / now, width=0.5 if kind == "bfloat16" else 1.0)
        if smaller <= most:
            yield f"{_setting(kind)} (about {words(smaller)})"


def _fewer_at_once(needs: Needs, config: Config, most: int) -> Iterator[str]:
    """Yield the setting by which fewer examples, or clients, are computed at once, where that is enough."""
    train = config.train
    if config.engine != "serial":
        alone = needs.of(rows=min(train.batch_size, needs.rows), clients=1)
        if alone <= most:
            yield f"engine = serial (about {words(alone)})"
        return
    if fits := [n for n in range(1, needs.rows) if needs.of(rows=n) <= most]:
        accumulate = ceil(train.batch_size * train.accumulate / fits[-1])
        smaller = f"train.batch_size = {fits[-1]} with train.accumulate = {accumulate}"
        yield f"{smaller} (about {words(needs.of(rows=fits[-1]))})"


def _kind(config: Config) -> str:
    """The number type of the base: its dtype, or that of its quantisation."""
    return config.model.dtype if config.model.quantize == "none" else config.model.quantize


def _kinds(config: Config) -> Iterator[str]:
    """Yield the smaller number types that the base may have."""
    if config.model.quantize != "none":
        return
    if config.model.dtype == "float32":
        yield "bfloat16"
    if find_spec("bitsandbytes"):
        yield from ("8bit", "4bit")


def _setting(kind: str) -> str:
    return f"model.quantize = {kind}" if kind.endswith("bit") else f"model.dtype = {kind}"


def _numbers(path: Path) -> int:
    """The numbers in a safetensors file, by its header; none in any other file."""
    if path.suffix != ".safetensors":
        return 0
    with suppress(OSError, ValueError, struct.error, KeyError, AttributeError), path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(size, 100_000_000)))
        return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return 0
