"""An update as the vector of integers that is masked: its layout and its fixed-point numbers, for both sides.

The change of every shared matrix travels as p times the change, where p is the client's public share of the weight.
After the changes comes the loss, if it may be sent, and in a run with client-level privacy whether the norm was within
the clip. The server sees sums of all of these, and nothing else.
"""

from math import frexp, isfinite, ldexp

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.errors import PrivacyError, SecureError
from fedlora.jobs import Job, MaskingTerms, SecAggStep, Update, shared_start
from fedlora.lora import SIDES, difference

from .secure_aggregation import Keys, Ring, Roster

MOST_WEIGHT = 0.5  # of one member: with more, the sum is mostly its own update
MOST_LOSS = 1e3  # the largest loss that can be sent: a loss travels as a share of it
Place = tuple[str, str, torch.Size]


def roster_of(ask: SecAggStep, *, colluders: int) -> Roster:
    """Return the roster of a round, from the message that tells it to a client.

    Raises `SecureError` for one that does not protect a member from the server with so many in league with it.
    """
    keys = {i: keys_of(*advertised) for i, advertised in ask.roster.items()}
    return Roster(ask.context, keys, ask.threshold, colluders)


def keys_of(sealing: str, masking: str, commitment: str) -> Keys:
    """Return the public keys that a member advertises, from their words in hexadecimal."""
    return Keys(sealing=bytes.fromhex(sealing), masking=bytes.fromhex(masking), commitment=bytes.fromhex(commitment))


def layout(job: Job) -> list[Place]:
    """Return side, module and shape of every matrix in the vector of a masked update, in their order there.

    Modules are sorted, so that server and client have the same order, however the job reached each.
    """
    shared = shared_start(job)
    return [(s, m, shared.side(s)[m].shape) for s in SIDES for m in sorted(shared.side(s))]


def size(job: Job) -> int:
    """Return how many numbers the vector of a masked update has."""
    matrices = sum(shape.numel() for *_, shape in layout(job))
    return matrices + len(_loss_entries(job, None)) + int(masking_terms(job).clip > 0)


def masking_terms(job: Job) -> MaskingTerms:
    """Return how a job's update is to be masked. Raises `PrivacyError` for a job without masking."""
    if job.masking is None:
        raise PrivacyError("this job has no terms of secure aggregation")
    return job.masking


def vector(job: Job, update: Update) -> NDArray[np.float64]:
    """Return the update as the vector that is masked, (size(job),).

    The change of every shared matrix in the order of `layout`, scaled to norm `clip` if the job has one; then the loss,
    if it may be sent, and of a private job 1 or 0 for whether the client tells one; then, with a clip, +1/2 or -1/2 for
    whether the norm was within it.
    """
    terms = masking_terms(job)
    change = difference(update.lora, shared_start(job))
    delta = torch.cat([change.side(s)[m].flatten() for s, m, _ in layout(job)])
    extras = _loss_entries(job, update.loss)
    if terms.clip:
        norm = float(delta.norm())
        extras.append(0.5 if norm <= terms.clip else -0.5)
        delta = _clipped(delta, norm=norm, clip=terms.clip)
    whole: NDArray[np.float64] = torch.cat([delta, terms.reach * torch.tensor(extras, dtype=torch.float64)]).numpy()
    return whole


def flags_loss(job: Job) -> bool:
    """Does a masked update say whether it has a loss? A private client that drew too few records tells none."""
    return job.metrics and job.privacy is not None


def _loss_entries(job: Job, loss: float | None) -> list[float]:
    """The numbers of a masked update that are of the loss: none, the loss, or the loss and whether there is one."""
    told = [0.0 if loss is None else _share_of_loss(loss)] if job.metrics else []
    return [*told, float(loss is not None)] if flags_loss(job) else told


def _share_of_loss(loss: float) -> float:
    return min(max(loss, 0.0), MOST_LOSS) / MOST_LOSS


def _clipped(delta: Tensor, *, norm: float, clip: float) -> Tensor:
    """Return delta scaled to at most this norm; zeros for a delta that is not finite."""
    if not isfinite(norm) or norm == 0:
        return torch.zeros_like(delta)
    return delta * min(1.0, clip / norm)


def encode(delta: NDArray[np.float64], *, weight: float, reach: float, members: int) -> Ring:
    """Return `weight * delta` in fixed point, (n,) integers mod 2^32.

    The coordinates of delta (n,) must lie within [-reach, reach], and the weights of all members sum to 1. A step is a
    power of two, at most 2 reach / (2^31 - 1 - members): 2^-30 for a reach of 1. Each coordinate is rounded towards
    zero by less than a step, so a sum of k vectors is off by less than k steps, and since nothing else is rounded, the
    norm of the encoded vector never exceeds that of `weight * delta` (a clipped norm stays clipped). The sum cannot
    wrap: the ring has room for reach and `members` steps, for weights that do not quite sum to 1.
    """
    if not 0 <= weight <= 1:
        raise SecureError(f"a weight is {weight}; take one from 0 to 1, of weights that sum to 1")
    largest = float(np.abs(delta).max(initial=0.0))
    if not largest <= reach:  # as NaN is not
        raise SecureError(f"the largest value of an update is {largest:g}, beyond {reach:g}: raise secure.reach")
    steps = np.trunc(np.asarray(delta, np.float64) * weight / _step(reach=reach, members=members))
    return steps.astype(np.int32).view(np.uint32)


def decode(total: Ring, *, reach: float, members: int) -> NDArray[np.float64]:
    """Return the encoded sum, to within a step for each vector in it."""
    return total.view(np.int32).astype(np.float64) * _step(reach=reach, members=members)


def _step(*, reach: float, members: int) -> float:
    """Return the size of a step of the fixed point."""
    if not (1e-30 <= reach <= 1e30 and 1 <= members <= 2**20):
        raise SecureError(f"secure.reach is {reach:g} for {members} members; take 1e-30 to 1e30, for 1 to {2**20}")
    return ldexp(1.0, 1 - frexp((2**31 - 1 - members) / reach)[1])  # a power of two, so that to scale is exact
