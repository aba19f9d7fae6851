"""Adapters in PEFT's files: written from a model, read back into it, and loaded by PEFT alone as a stranger does."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlora.data.schema import Schema
from fedlora.errors import ModelError, nearest
from fedlora.lora import LoRA, compact
from fedlora.sections import ModelConfig

from . import base_model
from .adapter import NAME, PREFIX, layers, quiet, tied
from .model import Model

CARD = "README.md"  # the model card of a folder that is shared
SHARED = (f".vera_A.{NAME}", f".vera_B.{NAME}")
LETTERS = {"lora_A": "A", "lora_B": "B", "vera_lambda_d": "A", "vera_lambda_b": "B"}
SEED = 2**31 - 1  # not the run's, so that a head that the export has forgotten gives other logits


def load_adapter(config: ModelConfig, schema: Schema, folder: Path) -> nn.Module:
    """A freshly loaded base with the PEFT adapter in `folder`."""
    net: nn.Module = _with_adapter(base_model.load_base_model(config, schema, SEED)[0], folder)
    return net


def check_loads(model: Model) -> None:
    """Raise `ModelError` where PEFT would not load this model's adapter as it writes it.

    What PEFT would write is loaded over the same architecture without weights, which takes next to no memory and time.
    PEFT renames modules and parameters of some architectures on the way.
    """
    net = model.net.get_base_model()
    try:
        amiss = _amiss(model, net)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as e:
        amiss = " ".join(str(e).split())[:300] or type(e).__name__
    if amiss:
        raise ModelError(
            f"an adapter on these modules of {type(net).__name__} could not be delivered, as PEFT does not load it as "
            f"it writes it: {amiss}; name other modules in lora.targets"
        )


def _amiss(model: Model, net: Any) -> str:
    """What of the adapter does not arrive over a base of this architecture on no device; empty if all does."""
    written, put = cast(Any, get_peft_model_state_dict), cast(Any, set_peft_model_state_dict)
    with _as_written(model, model.get_adapter()) as config:
        state = written(model.net, save_embedding_layers=False)
    config.base_model_name_or_path = None  # else PEFT warns that this is another model
    with torch.device("meta"), quiet():
        loaded = get_peft_model(type(net)(net.config), config, low_cpu_mem_usage=True)
    found = put(loaded, state, low_cpu_mem_usage=True)
    # VeRA's matrices are shared by all layers: they are written once, and in the model once for every layer.
    missing = [key for key in found.missing_keys if f".{NAME}" in key and not key.endswith(SHARED)]
    if missing:
        return f"{missing[0]} is not in it"
    return f"there is no place for {found.unexpected_keys[0]}" if found.unexpected_keys else ""


def load_merged(config: ModelConfig, schema: Schema, folder: Path) -> nn.Module:
    """The model in `folder`, which has the adapter in its weights."""
    net, _, _ = base_model.load_base_model(replace(config, path=str(folder.absolute()), revision=""), schema, SEED)
    return net


def merge(config: ModelConfig, schema: Schema, folder: Path) -> None:
    """Replace the adapter in `folder` by the base with the adapter in its weights, and by the base's processor."""
    net, processor, _ = base_model.load_base_model(config, schema, SEED)
    adapted = _with_adapter(net, folder)
    _untie(adapted)
    whole = adapted.merge_and_unload()
    shutil.rmtree(folder)
    whole.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def _untie(adapted: Any) -> None:
    """Give every adapted module a weight of its own, so that what goes into it does not go into the embedding too."""
    found = layers(adapted)
    for name in tied(adapted, found):
        base = found[name].get_base_layer()
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        adapted.get_base_model().config.tie_word_embeddings = False


def _with_adapter(net: nn.Module, folder: Path) -> Any:
    loaded: Any = PeftModel  # untyped
    with quiet():
        return loaded.from_pretrained(net, str(folder))


def save_peft(model: Model, lora: LoRA, folder: Path, rank: int = 0) -> None:
    """Write the adapter to `folder` as PEFT does, at whatever rank it has and with every module's s as in the run.

    All modules get one rank, of `rank` or more, and one alpha, for readers that know no more: see `_uniform`. The base
    goes by `model.base_name`, and PEFT's empty model card is left out. It is written beside the folder first, and each
    file then put in place whole, whatever lies there. Raises `OSError` or `SafetensorError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _as_written(model, lora, rank), TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        model.net.save_pretrained(beside, save_embedding_layers=False)  # they are the base's, as they were
        (Path(beside) / CARD).unlink(missing_ok=True)  # it names the base by its folder here
        _put_in_place(Path(beside), folder)


@contextmanager
def _as_written(model: Model, lora: LoRA, rank: int = 0) -> Iterator[Any]:
    """Have the adapter in the model as it is to be written, with the configuration for that, inside a `with`."""
    if model.kind != "vera":
        lora = compact(lora)
    written = lora if model.kind == "vera" else _uniform(model, lora, rank)
    model.set_adapter(written)
    peft_configs: Any = model.net.peft_config
    of_the_run = peft_configs[NAME]
    peft_configs[NAME] = _config_of(model, written)
    try:
        yield peft_configs[NAME]
    finally:
        peft_configs[NAME] = of_the_run
        model.set_adapter(lora)


def _uniform(model: Model, lora: LoRA, least: int = 0) -> LoRA:
    """The same product with one rank in all modules, by rows of A and columns of B that are zero, and with one s.

    The rank is the largest that a module has, or `least`. PEFT reads patterns of ranks and alphas; other readers take
    one alpha, and some take one rank.
    """
    rank, s = max(least, *(a.shape[0] for a in lora.A.values())), _largest_s(model)
    A = {m: F.pad(a, (0, 0, 0, rank - a.shape[0])) for m, a in lora.A.items()}
    B = {m: F.pad(b, (0, rank - b.shape[1])) for m, b in lora.B.items()}
    return replace(lora, A=A, B={m: b if model.scales[m] == s else b * (model.scales[m] / s) for m, b in B.items()})


def _largest_s(model: Model) -> float:
    return max(model.scales.values())


def _put_in_place(beside: Path, folder: Path) -> None:
    """Move every file to where it belongs; a folder that has its name there is damage, and is removed."""
    folder.mkdir(exist_ok=True)
    for path in beside.iterdir():
        if (folder / path.name).is_dir():
            shutil.rmtree(folder / path.name)
        path.replace(folder / path.name)


def _config_of(model: Model, lora: LoRA) -> Any:
    """PEFT's configuration of this adapter: the run's, with the adapter's own ranks and an alpha that keeps each s."""
    config: Any = copy(model.net.peft_config[NAME])
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = str(model.base_name), model.base_name.revision or None
    if model.kind == "vera":
        return config
    config.r = max(a.shape[0] for a in lora.A.values())
    config.lora_alpha = _largest_s(model) * config.r
    config.use_rslora = False
    config.rank_pattern = {}
    config.alpha_pattern = {}
    config.init_lora_weights = True  # else whoever loads it would take PiSSA's start out of the base
    return config


def load_peft(model: Model, folder: Path) -> LoRA:
    """Read the adapter that `save_peft` wrote, for this model: with B scaled to its s, and for VeRA over its A and B.

    Raises `ModelError` for an adapter of another kind, of other modules, or over other random matrices.
    """
    config: Any = PeftConfig.from_pretrained(str(folder))
    kind = "dora" if getattr(config, "use_dora", False) else config.peft_type.value.lower()
    if kind != model.kind:
        raise ModelError(f"{folder} holds a {kind} adapter; open it with lora.kind = {kind}")
    sides = _sides_in(folder)
    if kind == "vera":
        _drop_projections(model, sides["H"], folder)
    else:
        sides["B"] = {m: b * _rescaling(model, config, m, sides["A"][m], folder) for m, b in sides["B"].items()}
        _drop_padding(sides["A"], sides["B"])
    return LoRA(**sides)


def _drop_padding(A: dict[str, Tensor], B: dict[str, Tensor]) -> None:
    """Remove the last rows of A, with their columns of B, that are all zero, as `_uniform` adds them; one row stays."""
    for m, a in A.items():
        used = (a.any(1) | B[m].any(0)).nonzero()
        rank = int(used.max()) + 1 if len(used) else 1
        A[m], B[m] = a[:rank].contiguous(), B[m][:, :rank].contiguous()


def _sides_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The matrices in PEFT's file by side and module; what is no factor is a part of the head, under its own name."""
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "H": {}}
    for key, t in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix(PREFIX)
        module, _, end = name.removesuffix(".weight").rpartition(".")
        if end in LETTERS:
            sides[LETTERS[end]][module] = t
        else:
            sides["H"][name] = t
    return sides


def _drop_projections(model: Model, head: dict[str, Tensor], folder: Path) -> None:
    """Remove VeRA's frozen random matrices, which PEFT saves too, from what was read as the head.

    Raises `ModelError` if they are not the model's: the trained vectors mean nothing beside others.
    """
    for key in ("vera_A", "vera_B"):
        if not torch.equal(head.pop(f"base_model.{key}"), getattr(model.net.base_model, key)[NAME].cpu()):
            raise ModelError(f"{folder}: its {key} is of another seed, and its vectors mean nothing over this model's")


def _rescaling(model: Model, config: Any, module: str, a: Tensor, folder: Path) -> float:
    """The factor that turns B under the s of PEFT's configuration into B under this model's s."""
    if module not in model.scales:
        raise ModelError(f"{folder}: this model has no module {module} to adapt; {nearest(module, model.scales)}")
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    if a.shape[0] != r:
        raise ModelError(f"{folder}: {module} has rank {a.shape[0]}, its configuration says {r}")
    s: float = alpha / (r**0.5 if config.use_rslora else r)
    return s / model.scales[module]
