"""A run's state on disk: safetensors, its structure as JSON in the header; written whole or not at all, no pickle."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedlora.errors import CheckpointError

from .files import write_durably

SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a finished round left."""

    round: int
    state: Any
    record: dict[str, Any]  # the round's line in rounds.jsonl
    scores: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # client -> its last held-out scores


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the round's checkpoint, then drop all but the last two. Raises `CheckpointError` on a full disk."""
    tensors: dict[str, Tensor] = {}
    scores = {"scores": checkpoint.scores} if checkpoint.scores else {}
    tree = _pack({"state": checkpoint.state, "record": checkpoint.record, **scores}, tensors)
    metadata = {"round": str(checkpoint.round), "tree": json.dumps(tree), "sha256": _digest(tensors)}
    try:
        write_durably(folder / f"round-{checkpoint.round:06d}{SUFFIX}", to_bytes(tensors, metadata=metadata))
    except CheckpointError as e:
        raise CheckpointError(f"{e}, then {resume_hint(folder.parent)}") from e
    for old in list(_rounds(folder))[:-2]:
        old.unlink(missing_ok=True)


def resume_hint(run: Path) -> str:
    """How a run goes on, in words for whoever reads of a full disk: an engineer at a simulation, or at a server."""
    return f"start it again (a simulation: fedlora simulate --resume {run})"


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or none."""
    for path in reversed(list(_rounds(folder))):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError):
            continue  # cut short by a crash of the disk: the one before it is whole
    return None


def pack(value: Any) -> tuple[dict[str, Tensor], str]:
    """A tree of LoRAs, tensors and plain values as named tensors, and its structure as JSON."""
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_pack(value, tensors))


def _rounds(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob(f"round-*{SUFFIX}"))


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    if metadata.get("sha256", "") not in ("", _digest(tensors)):  # older versions wrote none
        raise ValueError(f"{path}: its numbers are not those that were written")
    tree = _unpack(json.loads(metadata["tree"]), tensors)
    return Checkpoint(int(metadata["round"]), tree["state"], tree["record"], tree.get("scores", {}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.view(-1).view(torch.uint8).numpy().data if t.numel() else b"")
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value: plain ones as they are, all others as a list that opens with what they are."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().contiguous().clone()  # clone: safetensors refuses tensors that share memory
        return ["tensor", name]
    if isinstance(value, Mapping):
        return ["dict", [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]]
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if is_dataclass(value) and not isinstance(value, type):
        return ["dataclass", kind, {f.name: _pack(getattr(value, f.name), tensors) for f in fields(value)}]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ["namedtuple", kind, [_pack(v, tensors) for v in value]]
    if isinstance(value, tuple | list):
        return [type(value).__name__, [_pack(v, tensors) for v in value]]
    raise CheckpointError(
        f"a strategy's state holds a {kind}; it may hold LoRA, tensors, plain values, tuples of these"
    )


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    match tree:
        case ["tensor", name]:
            return tensors[name]
        case ["dict", items]:
            return {_unpack(k, tensors): _unpack(v, tensors) for k, v in items}
        case ["tuple", items]:
            return tuple(_unpack(v, tensors) for v in items)
        case ["list", items]:
            return [_unpack(v, tensors) for v in items]
        case ["dataclass", kind, values]:
            return _type(kind)(**{k: _unpack(v, tensors) for k, v in values.items()})
        case ["namedtuple", kind, items]:
            return _type(kind)(*(_unpack(v, tensors) for v in items))
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
