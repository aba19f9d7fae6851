"""A client's part in secure aggregation: its update as a vector of integers, masked, and its answers on the way there.

What it changed travels as p times it, p its public share of the weight, in the fixed point of `secure.encode`. Behind
the update stand the loss, where it may be told, and where the run hides clients whether the clip was kept to: sums of
these, too, are all that the server sees.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import PrivacyError, SecureError
from .files import write_durably
from .lora import SIDES, LoRA
from .secure import Cohort, Keys, Member, encode
from .strategy import Ask, Job, Masking, Update

MOST_LOSS = 1e3  # a loss travels as a share of this
Place = tuple[str, str, torch.Size]


class Seat:
    """One client's place in the protocol; its secrets of the round lie in a file that only its owner can read."""

    def __init__(self, folder: Path, id: int) -> None:
        self._path, self._id = folder / "member.json", id

    def reply(self, ask: Ask) -> dict[str, str]:
        """Do one step. Raises `SecureError` for one that would give this client's update away."""
        if ask.step == "join":
            member = Member.join(self._id, ask.context)
            said = {name: key.hex() for name, key in vars(member.keys).items()}
        else:
            member = self._member(ask.context)
            said = _hex(member.share(cohort(ask)) if ask.step == "share" else member.reveal(ask.survivors))
        self._keep(member)
        return said

    def mask(self, job: Job, update: Update) -> Update:
        """The update as the server gets it: numbers that nobody can read but in the sum."""
        terms = masking(job)
        member = self._member(terms.context)
        numbers = encode(vector(job, update), terms.weight, terms.reach, terms.members)
        masked = member.mask(numbers, {i: bytes.fromhex(sealed) for i, sealed in terms.inbox.items()})
        self._keep(member)
        return replace(update, lora=LoRA(), loss=None, masked=torch.from_numpy(masked.view(np.int32)))

    def _member(self, context: str) -> Member:
        try:
            member = Member.loads(self._path.read_bytes())
        except OSError as e:
            raise SecureError(f"{context}: client {self._id} has no secrets of this round; let it join first") from e
        if member.context != context:
            raise SecureError(f"client {self._id} is in {member.context}, not in {context}; let it join first")
        return member

    def _keep(self, member: Member) -> None:
        """On the disk before anything is sent, so that no message is answered twice from an older state."""
        write_durably(self._path, member.dumps(), mode=0o600)


def cohort(ask: Ask) -> Cohort:
    """The members of a round, as a client is told of them."""
    keys = {i: Keys(*map(bytes.fromhex, three)) for i, three in ask.roster.items()}
    return Cohort(ask.context, keys, ask.threshold)


def layout(job: Job) -> list[Place]:
    """Where an update's numbers lie in its vector: side, module and shape, one after another."""
    return [(s, m, t.shape) for s in SIDES if s in job.shares for m, t in job.start.side(s).items()]


def size(job: Job) -> int:
    """Numbers in a job's vector."""
    return sum(shape.numel() for *_, shape in layout(job)) + job.metrics + bool(masking(job).clip)


def masking(job: Job) -> Masking:
    """How a job's update is to be hidden."""
    if job.masking is None:
        raise PrivacyError("this job has no terms of secure aggregation")
    return job.masking


def vector(job: Job, update: Update) -> NDArray[np.float64]:
    """What the update changed, clipped if the job says so, and behind it loss and bit: (size(job),)."""
    terms = masking(job)
    steps = [update.lora.side(s)[m].double() - job.start.side(s)[m].double() for s, m, _ in layout(job)]
    delta = torch.cat([t.flatten() for t in steps])
    extras = [min(max(update.loss or 0.0, 0.0), MOST_LOSS) / MOST_LOSS] if job.metrics else []
    if terms.clip:
        norm = float(delta.norm())
        extras.append(0.5 if norm <= terms.clip else -0.5)
        delta = delta * min(1.0, terms.clip / norm) if isfinite(norm) and norm else torch.zeros_like(delta)
    whole: NDArray[np.float64] = torch.cat([delta, terms.reach * torch.tensor(extras, dtype=torch.float64)]).numpy()
    return whole


def _hex(said: Mapping[int, bytes]) -> dict[str, str]:
    return {str(i): b.hex() for i, b in said.items()}
