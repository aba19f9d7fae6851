"""Files that a client keeps: the sides that it trains and does not share, by round, and its last reply.

Every file is replaced whole or not at all and holds a checksum of its numbers. A file that was cut short or altered is
noticed and logged, and the one before it is used. Files of version 0.1 are read too, at the end of this module.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fedlora.errors import CheckpointError, WireError
from fedlora.jobs import Job, PrivacySpent, Update
from fedlora.lora import SIDES, LoRA
from fedlora.tensors import by_name, file_bytes, read_file, to_adapter

from .files import write_durably

DAMAGE = CheckpointError, WireError, ValueError, LookupError, TypeError
EARLIER = (  # the fields of a Job that were in its hash in version 0.1, each as it is
    *("trains", "shares", "sketch", "gain", "resumes", "example_clip", "metrics", "upload", "feedback", "training"),
    *("seed", "round", "rounds"),
)
log = logging.getLogger("fedlora")


class ClientState:
    """A client's folder with what each round left of its own sides; that of the last two rounds stays.

    So a round which is done again, after a crash, starts as it did the first time. A list beside the files says of
    which rounds they are, so that one which is gone is noticed.
    """

    def __init__(self, folder: Path, name: str = "kept") -> None:
        self.folder, self._name = folder, name

    def before(self, round: int) -> LoRA:
        """What the latest round before this one left; empty if there was none, or none whose file is whole."""
        for n in self._rounds(round):
            try:
                return read(self._path(n))[0]
            except DAMAGE as e:
                log.warning("%s is missing or damaged (%s); what was kept before it is used", self._path(n), e)
        return LoRA()

    def of(self, round: int) -> LoRA:
        """What this very round left; empty where it left nothing, or its file is missing or damaged."""
        if round not in self._rounds():
            return LoRA()
        try:
            return read(self._path(round))[0]
        except DAMAGE as e:
            log.warning("%s is missing or damaged (%s); what was kept there is lost", self._path(round), e)
            return LoRA()

    def is_whole(self, round: int) -> bool:
        """Whether what `before` this round was left last, if anything, is there as it was written."""
        try:
            return all(read(self._path(n)) for n in self._rounds(round)[:1])
        except DAMAGE:
            return False

    def keep(self, round: int, lora: LoRA) -> None:
        """Write what this round leaves, if anything, and delete all but the files of the last two rounds."""
        if not lora:
            return
        write(self._path(round), lora, {})
        rounds = sorted({*self._rounds(), round})
        write_durably(self._list, json.dumps(rounds[-2:]).encode())
        for n in rounds[:-2]:
            with suppress(OSError):
                self._path(n).unlink()

    def _rounds(self, below: int | None = None) -> list[int]:
        """The rounds, below one, of which there are files or were by the list beside them; the latest first."""
        files = (path.stem.removeprefix(f"{self._name}-") for path in self.folder.glob(f"{self._name}-*.safetensors"))
        rounds = {int(n) for n in files if n.isdecimal()} | self._listed()
        return sorted((n for n in rounds if below is None or n < below), reverse=True)

    def _listed(self) -> set[int]:
        """The rounds in the list; none where it is missing, as in folders of version 0.1, or damaged."""
        try:
            return {int(n) for n in json.loads(self._list.read_bytes())}
        except (OSError, ValueError, TypeError):
            return set()

    @property
    def _list(self) -> Path:
        return self.folder / f"{self._name}.json"

    def _path(self, round: int) -> Path:
        return self.folder / f"{self._name}-{round:06d}.safetensors"


class CachedReply:
    """A client's last update, so that a job which comes again, as after a crash of the server, is not done twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answer.safetensors"

    def keep(self, job: str, update: Update) -> None:
        """Write the update of the job with this hash; when this returns, the update may be sent."""
        spent = [update.spent.epsilon, update.spent.charges] if update.spent else None
        loss, examples = json.dumps(update.loss), str(update.examples)
        write(self.path, update.lora, {"job": job, "examples": examples, "loss": loss, "spent": json.dumps(spent)})

    def to(self, job: str) -> Update | None:
        """The update of the job with this hash, if that is the one that was kept, and its file is whole."""
        try:
            lora, metadata = read(self.path)
            return _update(lora, metadata) if metadata["job"] == job else None
        except DAMAGE:
            return None


def _update(lora: LoRA, metadata: Mapping[str, str]) -> Update:
    """The update in a file that `CachedReply.keep` wrote."""
    spent = json.loads(metadata["spent"])
    told = PrivacySpent(epsilon=spent[0], charges=spent[1]) if spent else None
    return Update(lora, int(metadata["examples"]), json.loads(metadata["loss"]), told)


def write(path: Path, lora: LoRA, metadata: Mapping[str, str]) -> None:
    """Write an adapter as its owner's file, with a checksum of its numbers and metadata. Raises `CheckpointError`."""
    write_durably(path, file_bytes(by_name(lora), metadata), mode=0o600)


def read(path: Path) -> tuple[LoRA, dict[str, str]]:
    """The adapter and the metadata in a file. Raises one of `DAMAGE` for a file that is not as it was written."""
    tensors, metadata = read_file(path)
    if "manifest" in metadata:
        tensors = _of_one_vector(tensors["numbers"], metadata)
    return to_adapter(tensors), metadata


def earlier_job_hash(job: Job) -> str:
    """The hash that version 0.1 gave to a job: a ledger may hold the job under it, charged and not yet answered."""
    plain = sorted(((name, getattr(job, name)) for name in EARLIER), key=str)
    privacy = None
    if job.privacy:  # the name that its class had is in the hash
        privacy = f"Privacy({repr(replace(job.privacy, known=0)).partition('(')[2]}"
    adapters = {s: job.start.only(s) for s in SIDES} | {f"offset {i}": part for i, part in enumerate(job.offset)}
    parts = {where: _vector_hash(*_one_vector(part)) for where, part in adapters.items() if part.numel()}
    asked = repr(plain).replace(", loss='', regulariser=''", "")  # settings of later versions
    return sha256(f"({asked}, {privacy}, {parts!r})".encode()).hexdigest()


def _one_vector(lora: LoRA) -> tuple[Tensor, str]:
    """The adapter as version 0.1 wrote it: its matrices in one vector, and [[side, module, shape], ...] as JSON."""
    matrices = list(lora.matrices())
    vector = torch.cat([t.detach().reshape(-1).to("cpu", torch.float32) for _, _, t in matrices])
    return vector, json.dumps([[s, m, list(t.shape)] for s, m, t in matrices])


def _of_one_vector(vector: Tensor, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The matrices in a file of version 0.1. Raises `ValueError` for numbers that are not those it names."""
    manifest = metadata["manifest"]
    found = _vector_hash(vector, manifest)
    if metadata.get("name", found) != found:  # the first files had none
        raise ValueError("its numbers are not those that were written")
    entries = json.loads(manifest)
    pieces = torch.split(vector, [torch.Size(shape).numel() for *_, shape in entries])
    return {f"{side} {m}": piece.view(shape) for (side, m, shape), piece in zip(entries, pieces, strict=True)}


def _vector_hash(vector: Tensor, manifest: str) -> str:
    """The hash by which version 0.1 named a vector and its manifest."""
    numbers = vector.contiguous().view(torch.uint8).numpy().tobytes()
    return sha256(f"{vector.dtype}{manifest}".encode() + numbers).hexdigest()
