"""A client's part in secure aggregation: its masked update, and its answers to the steps of the protocol.

The update is masked as the vector of `fedlora.privacy.masked_update`, of which the server sees sums alone. The client's
secrets of a round lie on its disk from one message to the next.
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
    """One client in the protocol; its secrets of the round lie in a file that only its owner can read."""

    def __init__(self, folder: Path, id: int) -> None:
        self._path, self._id = folder / "member.json", id

    def reply(self, ask: SecAggStep) -> dict[str, str]:
        """Do one step and return the answer to it, in hexadecimal.

        Raises `SecureError` for a step that would give this client's update away.
        """
        if ask.step == "join":
            member = Participant.join(self._id, ask.context)
            keys = member.keys
            said = {"sealing": keys.sealing.hex(), "masking": keys.masking.hex(), "mark": keys.commitment.hex()}
        elif ask.step == "share":
            member = self._member(ask.context)
            said = _hex(member.share(roster_of(ask)))
        else:
            member = self._member(ask.context)
            said = _hex(member.reveal(ask.survivors))
        self._keep(member)
        return said

    def mask(self, job: Job, update: Update) -> Update:
        """Return the update as the server gets it: masked numbers, which can be read in the sum alone."""
        terms = masking_terms(job)
        member = self._member(terms.context)
        numbers = encode(vector(job, update), weight=terms.weight, reach=terms.reach, members=terms.members)
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
        """Write the member to the disk, before its answer is sent: no message is answered twice from an older state."""
        write_durably(self._path, member.dumps(), mode=0o600)


def _hex(said: Mapping[int, bytes]) -> dict[str, str]:
    return {str(i): b.hex() for i, b in said.items()}
