"""A client that trains some directions of the rank dimension only: what it is sent, and where what it sends back goes.

The server narrows a job as it hands it out and widens the update as it reads it, so that neither training nor the codec
knows of sketches: to them it is a job of lower rank. Where an update is to be masked the client does both, because
the server sees no single update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedlora.jobs import Job
from fedlora.lora import LoRA


def select_rows(job: Job) -> Job:
    """The job with those rows of A and columns of B alone that its sketch names, and s times r/k for them.

    S = r/k diag(1_I), so that E[S] = I; a gain of the job's own is multiplied by r/k. A job without a sketch is itself.
    """
    if not job.sketch:
        return job
    rows = {m: list(chosen) for m, chosen in job.sketch.items()}
    gain = {m: job.gain.get(m, 1.0) * job.start.A[m].shape[0] / len(chosen) for m, chosen in rows.items()}
    start, correction = _cut(job.start, rows), _cut(job.correction, rows)
    return replace(job, start=start, correction=correction, sketch={}, gain={**job.gain, **gain})


def _cut(lora: LoRA, rows: Mapping[str, list[int]]) -> LoRA:
    """The adapter with these rows of A and columns of B alone, where it has them."""
    A = {m: a[rows[m]] if m in rows else a for m, a in lora.A.items()}
    B = {m: b[:, rows[m]] if m in rows else b for m, b in lora.B.items()}
    return LoRA(A, B).over(lora)


def scatter_rows(job: Job, lora: LoRA) -> LoRA:
    """The update with the rows and columns that were not sent filled in from the job's start."""
    if not job.sketch:
        return lora
    return LoRA(
        A={m: _placed(job.start.A[m], a, job.sketch.get(m)) for m, a in lora.A.items()},
        B={m: _placed(job.start.B[m].T, b.T, job.sketch.get(m)).T for m, b in lora.B.items()},
        H=lora.H,
        R=lora.R,
    )


def _placed(whole: Tensor, part: Tensor, rows: Sequence[int] | None) -> Tensor:
    """`whole` (r, n), its named rows taken from `part` (k, n)."""
    if rows is None:
        return part
    placed = whole.to(part.dtype, copy=True)
    placed[list(rows)] = part
    return placed
