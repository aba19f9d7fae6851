"""A run's state on disk, after every round: a safetensors file whose header has the state's structure as JSON.

A file is written whole or not at all, and a hash over all of it tells damage. It holds what a resumed run rests on:
the state, the records of all rounds, and what the run was begun with. Nothing is pickled: a file names types and runs
no code.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import CheckpointError
from fedlora.tensors import file_bytes, read_file

from .files import write_durably

SUFFIX = ".safetensors"
RECORDS = "records"  # the tensor whose bytes are the records of the rounds before, as JSON
log = logging.getLogger("fedlora")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run after a round."""

    round: int
    state: Any
    record: dict[str, Any]  # the round's line in rounds.jsonl
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last held-out scores
    earlier: Sequence[dict[str, Any]] | None = None  # records of the rounds before; none: written by an older version
    in_flight: Any = None  # the jobs of an asynchronous run that clients are at
    begun_with: Mapping[str, Any] = field(default_factory=dict)  # the run's name, its settings, hashes of its files


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the round's checkpoint, then delete all but the last two. Raises `CheckpointError` on a full disk."""
    tensors: dict[str, Tensor] = {}
    scores = {"scores": checkpoint.scores} if checkpoint.scores else {}
    in_flight = {"in_flight": checkpoint.in_flight} if checkpoint.in_flight is not None else {}
    tree = _pack({"state": checkpoint.state, "record": checkpoint.record, **scores, **in_flight}, tensors)
    metadata = {"round": str(checkpoint.round), "tree": json.dumps(tree)}
    if checkpoint.begun_with:
        metadata["begun_with"] = json.dumps(checkpoint.begun_with)
    if checkpoint.earlier is not None:
        tensors[RECORDS] = torch.frombuffer(bytearray(json.dumps(list(checkpoint.earlier)).encode()), dtype=torch.uint8)
    try:
        write_durably(folder / f"round-{checkpoint.round:06d}{SUFFIX}", file_bytes(tensors, metadata))
    except CheckpointError as e:
        raise CheckpointError(f"{e}, then {resume_hint(folder.parent)}") from e
    for old in list(_rounds(folder))[:-2]:
        with suppress(OSError):
            old.unlink()


def resume_hint(run: Path) -> str:
    """What to do so that a run goes on, for the engineer at a simulation or at a server who reads of a full disk."""
    return f"start it again (a simulation: fedlora simulate --resume {run})"


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; none where there is no file. Raises `CheckpointError` if all are damaged."""
    return next(newest_first(folder), None)


def newest_first(folder: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints that are whole, and log which are not; the strategy's types have to be loaded already.

    Raises `CheckpointError` where there are files and not one of them can be used.
    """
    found, damage = 0, ""
    for path in reversed(list(_rounds(folder))):
        try:
            whole = _read(path)
        except CheckpointError as e:
            damage = damage or str(e)
            log.warning("%s; the checkpoint before it is used", e)
        else:
            found += 1
            yield whole
    if damage and not found:
        raise CheckpointError(
            f"{damage}; no checkpoint is left: put one back from a copy, or begin a new run elsewhere"
        )


def begun_with(folder: Path) -> Mapping[str, Any]:
    """What the newest checkpoint that is whole says the run was begun with; empty without one, or in older files."""
    for path in reversed(list(_rounds(folder))):
        with suppress(CheckpointError, ValueError):
            found: Mapping[str, Any] = json.loads(read_file(path)[1].get("begun_with", "{}"))
            return found
    return {}


def pack(value: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors in a value made of LoRAs, tensors and plain values, by name, and the value's structure as JSON."""
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_pack(value, tensors))


def _rounds(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob(f"round-*{SUFFIX}"))


def _read(path: Path) -> Checkpoint:
    """The checkpoint in a file. Raises `CheckpointError` where it is damaged, or holds types that are not defined."""
    tensors, metadata = read_file(path)
    try:
        tree = _unpack(json.loads(metadata["tree"]), tensors)
        return Checkpoint(
            round=int(metadata["round"]),
            state=tree["state"],
            record=tree["record"],
            scores=tree.get("scores", {}),
            in_flight=tree.get("in_flight"),
            earlier=json.loads(tensors[RECORDS].numpy().tobytes()) if RECORDS in tensors else None,
            begun_with=json.loads(metadata.get("begun_with", "{}")),
        )
    except CheckpointError:
        raise
    except Exception as e:  # files of version 0.1 have no hash over their structure, which may then be anything
        raise CheckpointError(f"{path} is damaged: {type(e).__name__}: {e}") from e


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value: plain ones as they are, all others as a list that opens with what they are."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach()
        return ["tensor", name]
    if isinstance(value, Mapping):
        return ["dict", [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]]
    if isinstance(value, tuple | list):
        kind = ["namedtuple", _kind(value)] if hasattr(value, "_fields") else [type(value).__name__]
        return [*kind, [_pack(v, tensors) for v in value]]
    return _pack_fields(value, tensors)


def _pack_fields(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a dataclass. Raises `CheckpointError` for anything else."""
    if not is_dataclass(value) or isinstance(value, type):
        raise CheckpointError(
            f"a strategy's state holds a {_kind(value)}; it may hold LoRA, tensors, plain values, tuples of these"
        )
    return ["dataclass", _kind(value), {f.name: _pack(getattr(value, f.name), tensors) for f in fields(value)}]


def _kind(value: Any) -> str:
    """The module and the name of a value's type."""
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `_pack` made this JSON of. Whatever it raises, the JSON is of something else."""
    if not isinstance(tree, list):
        return tree
    unpack = partial(_unpack, tensors=tensors)
    match tree:
        case ["tensor", name]:
            return tensors[name]
        case ["dict", items]:
            return {unpack(k): unpack(v) for k, v in items}
        case ["tuple", items]:
            return tuple(map(unpack, items))
        case ["list", items]:
            return list(map(unpack, items))
        case ["dataclass", kind, values]:
            return _type(kind)(**{k: unpack(v) for k, v in values.items()})
        case ["namedtuple", kind, items]:
            return _type(kind)(*map(unpack, items))
    raise ValueError(f"a checkpoint holds {tree[0]!r}, which this version does not know")


def _type(kind: str) -> Any:
    """A dataclass or named tuple by name, of a module that the run has loaded already: a file runs no code."""
    module, _, name = kind.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and (is_dataclass(found) or issubclass(found, tuple))):
        raise CheckpointError(f"the checkpoint holds a {kind}, which the strategy of this run does not define")
    return found
