"""How far the model that a round broadcasts lies from the weighted mean of the models that its clients trained."""

from collections.abc import Mapping

from fedlora.jobs import Job
from fedlora.lora import LoRA, join, norm, normalised, scale


def aggregation_error(
    adapter: LoRA, jobs: Mapping[int, Job], updates: Mapping[int, tuple[LoRA, float]], scales: Mapping[str, float]
) -> float | None:
    """||broadcast - ideal|| / ||ideal||, both as what is added to the pretrained weights; never a dense matrix.

    None where it is not defined: clients that keep a factor for themselves have no common model. A head is not counted
    (its mean is exact), and of a sketch the factors are, not the sketched forward pass.
    """
    if any(set(job.trains) - set(job.shares) - {"H"} for job in jobs.values()):
        return None
    p = normalised([weight for _, weight in updates.values()])
    models = [_model(jobs[i], lora) for i, (lora, _) in updates.items()]
    ideal = join(*[scale(model, w) for model, w in zip(models, p, strict=True)])
    size = norm(_scaled(ideal, scales))
    return norm(_scaled(join(adapter, scale(ideal, -1)), scales)) / size if size else 0.0


def _model(job: Job, update: LoRA) -> LoRA:
    """All that the client's model adds to the pretrained weights."""
    return join(*job.offset, update if job.resumes else update.over(job.start))


def _scaled(lora: LoRA, scales: Mapping[str, float]) -> LoRA:
    return LoRA(lora.A, {m: scales[m] * b for m, b in lora.B.items()})
