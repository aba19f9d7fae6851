"""Adapters in PEFT's files: written from a model, read back into it, and loaded by PEFT alone as a stranger does."""

import shutil
import warnings
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlora.data.schema import Schema
from fedlora.errors import ModelError, nearest
from fedlora.lora import LoRA, compact
from fedlora.sections import ModelConfig

from . import base_model
from .adapter import NAME, PREFIX, exactly
from .model import Model

LETTERS = {"lora_A": "A", "lora_B": "B", "vera_lambda_d": "A", "vera_lambda_b": "B"}
SEED = 2**31 - 1  # not the run's, so that a head that the export has forgotten gives other logits


def load_adapter(config: ModelConfig, schema: Schema, folder: Path) -> nn.Module:
    """A freshly loaded base with the PEFT adapter in `folder`."""
    net: nn.Module = _with_adapter(base_model.load_base_model(config, schema, SEED)[0], folder)
    return net


def load_merged(config: ModelConfig, schema: Schema, folder: Path) -> nn.Module:
    """The model in `folder`, which has the adapter in its weights."""
    net, _, _ = base_model.load_base_model(replace(config, path=str(folder.absolute()), revision=""), schema, SEED)
    return net


def merge(config: ModelConfig, schema: Schema, folder: Path) -> None:
    """Replace the adapter in `folder` by the base with the adapter in its weights, and by the base's processor."""
    net, processor, _ = base_model.load_base_model(config, schema, SEED)
    whole = _with_adapter(net, folder).merge_and_unload()
    shutil.rmtree(folder)
    whole.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def _with_adapter(net: nn.Module, folder: Path) -> Any:
    loaded: Any = PeftModel  # untyped
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT finds GPT-2's Conv1D by itself, and says so
        return loaded.from_pretrained(net, str(folder))


def save_peft(model: Model, lora: LoRA, folder: Path) -> None:
    """Write the adapter to `folder` as PEFT does, at whatever rank it has and with every module's s as in the run.

    It is written beside the folder first, and each file then put in place whole, whatever lies there. Raises `OSError`
    or `SafetensorError`.
    """
    if model.kind != "vera":
        lora = compact(lora)
    model.set_adapter(lora)
    peft_configs: Any = model.net.peft_config
    of_the_run = peft_configs[NAME]
    peft_configs[NAME] = _config_of(model, lora)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            model.net.save_pretrained(beside)
            _put_in_place(Path(beside), folder)
    finally:
        peft_configs[NAME] = of_the_run


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
    if model.kind == "vera":
        return config
    ranks = {m: a.shape[0] for m, a in lora.A.items()}
    alphas = {m: model.scales[m] * r for m, r in ranks.items()}
    config.use_rslora = False
    config.r = max(ranks.values())
    config.lora_alpha = max(alphas.values())
    config.rank_pattern = exactly(_all_but(config.r, ranks))
    config.alpha_pattern = exactly(_all_but(config.lora_alpha, alphas))
    config.init_lora_weights = True  # else whoever loads it would take PiSSA's start out of the base
    return config


def _all_but(usual: float, numbers: Mapping[str, float]) -> dict[str, float]:
    return {m: number for m, number in numbers.items() if number != usual}


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
    return LoRA(**sides)


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
