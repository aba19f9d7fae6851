"""A client's part in secure aggregation: its masked update, and its answers to the steps of the protocol.

The update is masked as the vector of `fedlora.privacy.masked_update`, of which the server sees sums alone. The client's
secrets of a round lie on its disk from one message to the next.

A round is masked once. The same job has the same update in every attempt at its round, so the sums of two attempts, of
which one lacks a client, differ by that client's update. The number of the round is therefore on the disk before the
masked vector leaves, and neither that round nor an earlier one is masked again, whatever becomes of the sum.

A round of two passes (`Job.right`, then `Job.left`) is masked once in each, with the same weight. A client reveals
nothing for the second sum where it and the first one together would tell what too few members trained.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.errors import MaskedBefore, SecureError
from fedlora.jobs import Job, SecAggStep, Update, is_projected
from fedlora.lora import LoRA
from fedlora.privacy.masked_update import MOST_WEIGHT, encode, masking_terms, roster_of, vector
from fedlora.privacy.secure_aggregation import Participant, why_exposed
from fedlora.storage.files import hold_lock, write_durably


@dataclass(frozen=True, kw_only=True)
class _LastMasked:
    """The update that a client has masked last, as a file beside its secrets knows it."""

    round: int = 0  # from 1; 0: none yet
    exchange: int = 0  # the pass of that round, from 0
    weight: float = 0.0  # of this client in the round's first sum; 0 where the round has no second one
    survivors: tuple[int, ...] = ()  # the members of that sum, once this client has revealed its shares for it

    def __post_init__(self) -> None:
        object.__setattr__(self, "survivors", tuple(self.survivors))  # JSON has lists


class SecAggClient:
    """One client in the protocol; its secrets of the round lie in a file that only its owner can read."""

    def __init__(self, folder: Path, id: int, colluders: int = 1) -> None:
        """`colluders`: how many other clients this one takes to be in league with the server at most."""
        self._colluders = colluders
        self._path, self._masked, self._id = folder / "member.json", folder / "masked.json", id

    def reply(self, ask: SecAggStep) -> dict[str, str]:
        """Do one step and return the answer to it, in hexadecimal.

        Raises `SecureError` for a step that would give this client's update away, and `MaskedBefore` where it is asked
        to join a round again that it has masked an update of.
        """
        with self._alone():
            return self._reply(ask)

    def mask(self, job: Job, update: Update) -> Update:
        """Return the update as the server gets it: masked numbers, which can be read in the sum alone.

        Raises `MaskedBefore` for a round of which one was masked before.
        """
        terms = masking_terms(job)
        with self._alone():
            self.refuse(job)
            member = self._member(terms.context)
            numbers = encode(vector(job, update), weight=terms.weight, reach=terms.reach, members=terms.members)
            masked = member.mask(numbers, {i: bytes.fromhex(sealed) for i, sealed in terms.inbox.items()})
            self._note(self._after(job))
            self._keep(member)
        return replace(update, lora=LoRA(), loss=None, masked=torch.from_numpy(masked.view(np.int32)))

    def _after(self, job: Job) -> _LastMasked:
        """What is masked last once this job is; of a round with two passes, what its second one is held against."""
        weight = masking_terms(job).weight if is_projected(job) else 0.0
        survivors = self._last_masked().survivors if job.left else ()
        return _LastMasked(round=job.round + 1, exchange=_exchange(job), weight=weight, survivors=survivors)

    def refuse(self, job: Job) -> None:
        """Raise `SecureError` for a job whose update is not to be masked, before anything is trained for it.

        That is a round which was masked before (`MaskedBefore`), and a share of the weight by which the sum would be
        this client's own update; of a second pass also another weight than in the first, by which the two sums would
        differ in what this client trained.
        """
        self.refuse_masked(job.round, _exchange(job))
        weight, last = masking_terms(job).weight, self._last_masked()
        if job.left and weight != last.weight:
            raise SecureError(
                f"client {self._id} would have the weight {weight:.6g} in the second sum of round {job.round + 1}, and "
                f"had {last.weight:.6g} in the first; the difference of the two would be its own"
            )
        if not 0 <= weight <= MOST_WEIGHT * (1 + 1e-9):
            raise SecureError(
                f"client {self._id} would have {weight:.3g} of the weight of round {job.round + 1}, and a sum in which "
                f"one has more than {MOST_WEIGHT:g} is mostly its own update; ask for server.weights = uniform"
            )

    def refuse_masked(self, round: int, exchange: int = 0) -> None:
        """Raise `MaskedBefore` where this pass of this round (from 0, both), or a later one, has been masked.

        Raises `SecureError` for a second pass of a round of which this client is in no first sum.
        """
        last = self._last_masked()
        if (round + 1, exchange) <= (last.round, last.exchange):
            raise MaskedBefore(
                f"client {self._id} has masked its update of round {last.round}, and masks none of round {round + 1} "
                "again: two sums could differ by this client's update; the run goes on with its next round"
            )
        if exchange and not (last.round == round + 1 and last.survivors):
            raise SecureError(
                f"client {self._id} is asked for the second pass of round {round + 1}, and is in no sum of its first; "
                "it takes part again from the next round on"
            )

    def _reply(self, ask: SecAggStep) -> dict[str, str]:
        if ask.step == "join":
            self.refuse_masked(ask.round, ask.exchange)
            member = Participant.join(self._id, ask.context)
            keys = member.keys
            said = {"sealing": keys.sealing.hex(), "masking": keys.masking.hex(), "mark": keys.commitment.hex()}
        elif ask.step == "share":
            member = self._member(ask.context)
            said = _hex(member.share(roster_of(ask, colluders=self._colluders)))
        else:
            member = self._member(ask.context)
            said = _hex(self._revealed(member, ask.survivors))
        self._keep(member)
        return said

    def _revealed(self, member: Participant, survivors: tuple[int, ...]) -> Mapping[int, bytes]:
        """The shares for these survivors; whose sum it is stays on the disk, for the round's second one.

        Raises `SecureError` where the round's two sums together would tell too much.
        """
        last = self._last_masked()
        if last.exchange and (why := why_exposed(last.survivors, survivors, colluders=self._colluders)):
            raise SecureError(f"{member.context}: client {self._id} reveals nothing: {why}; begin a new round")
        shares = member.reveal(survivors)
        if last.weight and not last.exchange:
            self._note(replace(last, survivors=tuple(sorted(survivors))))
        return shares

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the member for one step: of two processes at once, each could do what the other makes impossible."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(self._path.with_name("member.lock"), wait=True):
            yield

    def _note(self, masked: _LastMasked) -> None:
        """Write on the disk what was masked last, before anything of it leaves."""
        write_durably(self._masked, json.dumps(asdict(masked)).encode(), mode=0o600)

    def _last_masked(self) -> _LastMasked:
        """Return what was masked last. Raises `SecureError`."""
        try:
            found: dict[str, Any] = json.loads(self._masked.read_bytes())
            return _LastMasked(**found | {"round": int(found["round"])})
        except FileNotFoundError:
            return _LastMasked()
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise SecureError(
                f"{self._masked} cannot be read, and says which rounds client {self._id} has masked; put it back from "
                "a copy, or take no further part in this run"
            ) from e

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


def _exchange(job: Job) -> int:
    """The pass of a round that a job is of: 1 where it asks about what was trained before, and trains nothing."""
    return int(bool(job.left))


def _hex(said: Mapping[int, bytes]) -> dict[str, str]:
    return {str(i): b.hex() for i, b in said.items()}
