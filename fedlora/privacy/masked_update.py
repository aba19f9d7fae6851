"""An update as the vector of integers that is masked: its layout and its fixed-point numbers, for both sides.

The change of every shared matrix travels as p times the change, where p is the client's public share of the weight.
Behind it stand the loss, where it may be told, and where the run hides clients whether the clip was kept to: the
server sees sums of these, and nothing else.
"""

from math import frexp, isfinite, ldexp

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.errors import PrivacyError, SecureError
from fedlora.jobs import Job, MaskingTerms, SecAggStep, Update
from fedlora.lora import SIDES

from .secure_aggregation import Keys, Ring, Roster

MOST_LOSS = 1e3  # a loss travels as a share of this
Place = tuple[str, str, torch.Size]


def roster_of(ask: SecAggStep) -> Roster:
    """The members of a round, as a client is told of them."""
    keys = {i: Keys(*map(bytes.fromhex, three)) for i, three in ask.roster.items()}
    return Roster(ask.context, keys, ask.threshold)


def layout(job: Job) -> list[Place]:
    """Where an update's numbers lie in its vector: side, module and shape, one after another."""
    return [(s, m, t.shape) for s in SIDES if s in job.shares for m, t in job.start.side(s).items()]


def size(job: Job) -> int:
    """Numbers in a job's vector."""
    return sum(shape.numel() for *_, shape in layout(job)) + job.metrics + bool(masking_terms(job).clip)


def masking_terms(job: Job) -> MaskingTerms:
    """How a job's update is to be hidden."""
    if job.masking is None:
        raise PrivacyError("this job has no terms of secure aggregation")
    return job.masking


def vector(job: Job, update: Update) -> NDArray[np.float64]:
    """What the update changed, clipped if the job says so, and behind it loss and bit: (size(job),)."""
    terms = masking_terms(job)
    steps = [update.lora.side(s)[m].double() - job.start.side(s)[m].double() for s, m, _ in layout(job)]
    delta = torch.cat([t.flatten() for t in steps])
    extras = [min(max(update.loss or 0.0, 0.0), MOST_LOSS) / MOST_LOSS] if job.metrics else []
    if terms.clip:
        norm = float(delta.norm())
        extras.append(0.5 if norm <= terms.clip else -0.5)
        delta = delta * min(1.0, terms.clip / norm) if isfinite(norm) and norm else torch.zeros_like(delta)
    whole: NDArray[np.float64] = torch.cat([delta, terms.reach * torch.tensor(extras, dtype=torch.float64)]).numpy()
    return whole


def encode(delta: NDArray[np.float64], weight: float, reach: float, members: int) -> Ring:
    """`weight * delta` in fixed point, for coordinates of delta within [-reach, reach] and weights that sum to 1.

    A step is a power of two, at most 2 reach / (2^31 - 1 - members): 2^-30 for a reach of 1. Each coordinate is rounded
    towards zero by less than a step, so a sum of k vectors is off by less than k steps, and since nothing else is
    rounded, the norm of what is encoded never exceeds the norm of `weight * delta` (a clipped norm stays clipped). The
    sum cannot wrap: the ring has room for reach and `members` steps, for weights that do not quite sum to 1.
    """
    if not 0 <= weight <= 1:
        raise SecureError(f"a weight is {weight}; take one from 0 to 1, of weights that sum to 1")
    largest = float(np.abs(delta).max(initial=0.0))
    if not largest <= reach:  # as NaN is not
        raise SecureError(f"the largest value of an update is {largest:g}, beyond {reach:g}: raise secure.reach")
    steps = np.trunc(np.asarray(delta, np.float64) * weight / _step(reach, members))
    return steps.astype(np.int32).view(np.uint32)


def decode(total: Ring, reach: float, members: int) -> NDArray[np.float64]:
    """The sum that was encoded, to within a step for each vector in it."""
    return total.view(np.int32).astype(np.float64) * _step(reach, members)


def _step(reach: float, members: int) -> float:
    if not (1e-30 <= reach <= 1e30 and 1 <= members <= 2**20):
        raise SecureError(f"secure.reach is {reach:g} for {members} members; take 1e-30 to 1e30, for 1 to {2**20}")
    return ldexp(1.0, 1 - frexp((2**31 - 1 - members) / reach)[1])  # a power of two, so that to scale is exact
