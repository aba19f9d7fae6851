"""What is delivered is what was evaluated: a model that was written is loaded afresh, and gives the run's logits.

The base comes from its own files then, and the adapter through PEFT's loader, as with whoever gets it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import IGNORED, Example
from fedlora.errors import ExportError, FedloraError
from fedlora.lora import LoRA
from fedlora.models import peft_files, probe
from fedlora.models.model import Model
from fedlora.models.objectives import network_inputs
from fedlora.sections import ModelConfig
from fedlora.storage.files import write_durably

from .directory import RunDirectory
from .setup import RunSetup

EXAMPLES = 8  # on which two models are compared
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # of the logits' size; a merged weight is rounded so
ROOM = 1.1  # times the size of a base that must be free to load it a second time


@dataclass(frozen=True, eq=False)
class Unverified:
    """A model that was written and is yet to be verified."""

    folder: Path
    logits: Tensor  # that it has to give
    notes: tuple[str, ...] = ()  # to print once it does


@dataclass(frozen=True, eq=False)
class LogitsProbe:
    """A few examples, and how models of the run's kind are asked about them."""

    config: ModelConfig
    schema: Schema
    device: torch.device
    batch: dict[str, Tensor]

    @torch.no_grad()
    def logits(self, net: nn.Module) -> Tensor:
        """The model's logits: (examples, outputs of a head); or (examples, vocabulary) after each example's last token;
        or of an encoder-decoder (tokens, vocabulary) of what all examples are to learn."""
        if self.config.quantize == "none":  # a quantised base is where it belongs already
            net.to(self.device)
        inputs = network_inputs(self.batch, self.device, getattr(torch, self.config.dtype))
        scores: Tensor = net.eval()(**inputs).logits.float().cpu()
        if self.schema.has_head:
            return scores
        if "decoder_input_ids" in self.batch:
            return scores[self.batch["labels"] != IGNORED] if "labels" in self.batch else scores[:, -1]
        mask = self.batch["attention_mask"]
        return scores[torch.arange(len(scores)), (mask * torch.arange(mask.shape[1])).argmax(1)]


def probe_of(setup: RunSetup) -> LogitsProbe:
    """Examples to compare two models on: of the evaluation, else of a client, else a made-up one."""
    model = setup.model
    some = _spread(setup.evaluation) or next((_spread(data.train) for data in setup.clients_data if data.train), [])
    batch = model.encoder.collate(some) if some else probe.inputs(model.net, model.processor, model.schema)
    return LogitsProbe(setup.config.model, model.schema, model.device, batch)


def _spread(examples: Sequence[Example]) -> list[Example]:
    """A few of the examples, from the first to the last."""
    return list(examples[:: max(1, len(examples) // EXAMPLES)][:EXAMPLES])


def verify(probe: LogitsProbe, written: Unverified, form: str) -> float:
    """The largest difference of the written model's logits from the run's, as a share of their size.

    `form` is that of an export. Raises `ExportError` where it cannot be loaded, or where the difference is above the
    limit for the base model's number type.
    """
    try:
        if form == "merged":
            peft_files.merge(probe.config, probe.schema, written.folder)
            net = peft_files.load_merged(probe.config, probe.schema, written.folder)
        else:
            net = peft_files.load_adapter(probe.config, probe.schema, written.folder)
        logits = probe.logits(net)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        said = " ".join(str(e).split())[:300]
        raise ExportError(f"the {form} model was written, and cannot be loaded by others: {said}") from e
    gap = float((logits - written.logits).abs().max() / written.logits.abs().max())
    limit = LIMITS[probe.config.dtype]
    if not gap <= limit:  # nor where it is no number
        raise ExportError(
            f"the {form} model, loaded afresh, gives logits that differ from the run's by {gap:.2g} of their size, "
            f"more than {limit:g}: it is not what was evaluated"
        )
    return gap


def check_adapter(setup: RunSetup, adapter: LoRA, folder: RunDirectory) -> None:
    """Load the delivered adapter afresh, and keep beside it whether it gives the logits that the run's model has.

    Raises `ExportError` where it does not.
    """
    model = setup.model
    if short := _short_of_memory(model):
        return _keep(folder, {"verified": False, "said": short})
    try:
        probe = probe_of(setup)
        model.set_adapter(adapter)
        wanted = probe.logits(model.net)
        gap = verify(probe, Unverified(folder.adapter, wanted), "adapter")
    except ExportError as e:
        said = f"{folder.adapter} is not what was evaluated: {e}"
        _keep(folder, {"verified": False, "said": said})
        raise ExportError(f"{said}; the rounds are kept, see whether fedlora export can write it otherwise") from e
    except FedloraError as e:  # the base cannot be had a second time: nothing was compared
        return _keep(folder, {"verified": False, "said": f"not loaded afresh: {e}"})
    said = f"loaded afresh by PEFT, it gives the run's logits (within {gap:.0e} of their size)"
    return _keep(folder, {"verified": True, "said": said, "difference": gap, "examples": len(wanted)})


def _short_of_memory(model: Model) -> str:
    """Why the base cannot be loaded a second time beside the first; empty where there is room."""
    base = sum(t.numel() * t.element_size() for t in model.net.parameters())
    free = psutil.virtual_memory().available
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    if base * ROOM <= free:
        return ""
    return (
        f"not loaded afresh: a second base takes {base / 1e9:.1f} GB beside the first, and {free / 1e9:.1f} GB are "
        "free; fedlora export verifies it"
    )


def _keep(folder: RunDirectory, found: dict[str, object]) -> None:
    write_durably(folder.adapter_check, f"{json.dumps(found)}\n".encode())
