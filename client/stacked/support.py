"""Whether a job can be trained in one pass with those of other clients, and if not, why."""

from fedlora.client.stacked.row_pass import NotStackableError, head_layers
from fedlora.jobs import Job
from fedlora.models.model import Model

KINDS = {
    "dora": "lora.kind = dora divides by norms of W + s B A, which are other ones for every client",
    "vera": "lora.kind = vera trains vectors between matrices that all modules share",
}


def why_not(model: Model, job: Job) -> str | None:
    """The sentence that says why a job of this model has to be trained by itself; None where it has not."""
    if model.kind in KINDS:
        return KINDS[model.kind]
    if job.privacy:
        return "a private job is trained by itself"
    try:
        list(head_layers(model))
    except NotStackableError as e:
        return str(e)
    return None
