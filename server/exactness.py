"""The exactness meter: how far the new model lies from the weighted mean of the models that its clients trained."""

from collections.abc import Mapping

from fedlora.jobs import Job, is_projected, own_sides
from fedlora.lora import LoRA, join, norm, normalised, scale


def aggregation_error(
    adapter: LoRA, jobs: Mapping[int, Job], updates: Mapping[int, tuple[LoRA, float]], scales: Mapping[str, float]
) -> float | None:
    """The relative distance ||broadcast - ideal|| / ||ideal||, where ideal is the weighted mean of the clients' models.

    Models are what is added to the pretrained weights, `scales` is the s of every module, and no dense matrix is made.
    The result is None where clients keep a factor for themselves, because then they have no common model, and where
    they send projections of their products, of which the server does not learn how large the products are. A head is
    left out (its mean is exact); of a sketch the factors are compared, not the sketched forward pass.
    """
    if any(is_projected(job) or _keeps_a_factor(job) for job in jobs.values()):
        return None
    p = normalised([weight for _, weight in updates.values()])
    models = [_model(jobs[i], lora) for i, (lora, _) in updates.items()]
    ideal = join(*[scale(model, w) for model, w in zip(models, p, strict=True)])
    size = norm(_scaled(ideal, scales))
    error = norm(_scaled(join(adapter, scale(ideal, -1)), scales))
    return error / size if size else 0.0


def _keeps_a_factor(job: Job) -> bool:
    return bool(own_sides(job).strip("H")) or job.keeps_rank > 0


def _model(job: Job, update: LoRA) -> LoRA:
    """All that the client's model adds to the pretrained weights."""
    return join(*job.offset, update if job.resumes else update.over(job.start))


def _scaled(lora: LoRA, scales: Mapping[str, float]) -> LoRA:
    """The adapter with every module's s in its B."""
    return LoRA(lora.A, {m: scales[m] * b for m, b in lora.B.items()})
