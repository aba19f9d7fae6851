"""A run's state on disk, after every round: a safetensors file whose header has the state's structure as JSON.

A file is written whole or not at all. Nothing is pickled: a file names types and runs no code.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora.errors import CheckpointError
from fedlora.tensors import file_bytes, read_file

from .files import write_durably

SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run after a round."""

    round: int
    state: Any
    record: dict[str, Any]  # the round's line in rounds.jsonl
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last held-out scores


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the round's checkpoint, then delete all but the last two. Raises `CheckpointError` on a full disk."""
    tensors: dict[str, Tensor] = {}
    scores = {"scores": checkpoint.scores} if checkpoint.scores else {}
    tree = _pack({"state": checkpoint.state, "record": checkpoint.record, **scores}, tensors)
    metadata = {"round": str(checkpoint.round), "tree": json.dumps(tree)}
    try:
        write_durably(folder / f"round-{checkpoint.round:06d}{SUFFIX}", file_bytes(tensors, metadata))
    except CheckpointError as e:
        raise CheckpointError(f"{e}, then {resume_hint(folder.parent)}") from e
    for old in list(_rounds(folder))[:-2]:
        old.unlink(missing_ok=True)


def resume_hint(run: Path) -> str:
    """What to do so that a run goes on, for the engineer at a simulation or at a server who reads of a full disk."""
    return f"start it again (a simulation: fedlora simulate --resume {run})"


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or none."""
    for path in reversed(list(_rounds(folder))):  # one that a crash of the disk cut short is passed over
        if found := _read(path):
            return found
    return None


def pack(value: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors in a value made of LoRAs, tensors and plain values, by name, and the value's structure as JSON."""
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_pack(value, tensors))


def _rounds(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob(f"round-*{SUFFIX}"))


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint in a file; none where the file is damaged."""
    try:
        tensors, metadata = read_file(path)
    except CheckpointError:
        return None
    try:
        tree = _unpack(json.loads(metadata["tree"]), tensors)
        return Checkpoint(int(metadata["round"]), tree["state"], tree["record"], tree.get("scores", {}))
    except (ValueError, KeyError):
        return None


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
    """The value that `_pack` made this JSON of. Raises `ValueError` or `KeyError` for another."""
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
