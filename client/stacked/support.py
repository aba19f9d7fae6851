"""Whether a job can be trained in one pass with those of other clients, and if not, why."""

from fedlora.client.stacked.row_pass import NotStackableError, head_layers
from fedlora.jobs import Job, PrivacyTerms
from fedlora.models.model import Model
from fedlora.privacy.dpsgd import is_precise
from fedlora.privacy.preflight import mixes_losses

KINDS = {
    "dora": "lora.kind = dora divides by norms of W + s B A, which differ from client to client",
    "vera": "lora.kind = vera trains vectors between matrices that all modules share",
}


def why_not(model: Model, job: Job) -> str | None:
    """The sentence that says why a job of this model has to be trained by itself; None where it has not."""
    if model.kind in KINDS:
        return KINDS[model.kind]
    if job.privacy and (why := _why_not_privately(model, job.privacy)):
        return why
    if not job.privacy and mixes_losses(model, job.training):
        return (
            f"train.loss = {job.training.loss} gives a target another loss beside others than alone, and clients of a "
            "pass share batches"
        )
    try:
        list(head_layers(model))
    except NotStackableError as e:
        return str(e)
    return None


def _why_not_privately(model: Model, privacy: PrivacyTerms) -> str | None:
    if privacy.engine in ("hooks", "one"):
        return f"dp.engine = {privacy.engine} finds the gradients of one client's records at a time"
    if not is_precise(model.net):
        return (
            "over a base of fewer than 32 bits private records are taken one at a time: those of one micro-batch would "
            "move each other's gradients by rounding"
        )
    return None
