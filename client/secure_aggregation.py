"""A client's part in secure aggregation: its update as a vector of integers, masked, and its answers on the way there.

What it changed travels as p times it, p its public share of the weight, in the fixed point of `secure.encode`. Behind
the update stand the loss, where it may be told, and where the run hides clients whether the clip was kept to: sums of
these, too, are all that the server sees.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedlora.errors import SecureError
from fedlora.jobs import Job, SecAggStep, Update
from fedlora.lora import LoRA
from fedlora.privacy.masked_update import encode, masking_terms, roster_of, vector
from fedlora.privacy.secure_aggregation import Participant
from fedlora.storage.files import write_durably


class SecAggClient:
    """One client's place in the protocol; its secrets of the round lie in a file that only its owner can read."""

    def __init__(self, folder: Path, id: int) -> None:
        self._path, self._id = folder / "member.json", id

    def reply(self, ask: SecAggStep) -> dict[str, str]:
        """Do one step. Raises `SecureError` for one that would give this client's update away."""
        if ask.step == "join":
            member = Participant.join(self._id, ask.context)
            said = {name: key.hex() for name, key in vars(member.keys).items()}
        else:
            member = self._member(ask.context)
            said = _hex(member.share(roster_of(ask)) if ask.step == "share" else member.reveal(ask.survivors))
        self._keep(member)
        return said

    def mask(self, job: Job, update: Update) -> Update:
        """The update as the server gets it: numbers that nobody can read but in the sum."""
        terms = masking_terms(job)
        member = self._member(terms.context)
        numbers = encode(vector(job, update), terms.weight, terms.reach, terms.members)
        masked = member.mask(numbers, {i: bytes.fromhex(sealed) for i, sealed in terms.inbox.items()})
        self._keep(member)
        return replace(update, lora=LoRA(), loss=None, masked=torch.from_numpy(masked.view(np.int32)))

    def _member(self, context: str) -> Participant:
        try:
            member = Participant.loads(self._path.read_bytes())
        except OSError as e:
            raise SecureError(f"{context}: client {self._id} has no secrets of this round; let it join first") from e
        if member.context != context:
            raise SecureError(f"client {self._id} is in {member.context}, not in {context}; let it join first")
        return member

    def _keep(self, member: Participant) -> None:
        """On the disk before anything is sent, so that no message is answered twice from an older state."""
        write_durably(self._path, member.dumps(), mode=0o600)


def _hex(said: Mapping[int, bytes]) -> dict[str, str]:
    return {str(i): b.hex() for i, b in said.items()}
