"""A client that trains some directions of the rank dimension only: what it is sent, and where what it sends back goes.

The round loop does both, so that neither the client nor the wire knows of sketches: to them it is a job of lower rank.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedlora.jobs import Job
from fedlora.lora import LoRA


def narrow(job: Job) -> Job:
    """The job as it is sent: of A and B only what is in the sketch, with s times r/k (S = r/k diag(1_I), E[S] = I)."""
    if not job.sketch:
        return job
    rows = {m: list(chosen) for m, chosen in job.sketch.items()}
    start = LoRA(
        A={m: a[rows[m]] if m in rows else a for m, a in job.start.A.items()},
        B={m: b[:, rows[m]] if m in rows else b for m, b in job.start.B.items()},
        H=job.start.H,
        R=job.start.R,
    )
    gain = {m: job.gain.get(m, 1.0) * job.start.A[m].shape[0] / len(chosen) for m, chosen in rows.items()}
    return replace(job, start=start, sketch={}, gain={**job.gain, **gain})


def widen(job: Job, lora: LoRA) -> LoRA:
    """What came back in its place in the start, which stands for every row and column that was not sent."""
    if not job.sketch:
        return lora
    return LoRA(
        A={m: _placed(job.start.A[m], a, job.sketch.get(m)) for m, a in lora.A.items()},
        B={m: _placed(job.start.B[m].T, b.T, job.sketch.get(m)).T for m, b in lora.B.items()},
        H=lora.H,
        R=lora.R,
    )


def _placed(whole: Tensor, part: Tensor, rows: Sequence[int] | None) -> Tensor:
    """`whole` (r, n) with these rows from `part` (k, n)."""
    if rows is None:
        return part
    placed = whole.to(part.dtype, copy=True)
    placed[list(rows)] = part
    return placed
