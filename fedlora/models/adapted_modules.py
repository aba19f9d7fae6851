"""Which modules of a base model an adapter is attached to, which are left out, and why.

An adapter has two matrices beside the weight of a linear layer. It does nothing where the layer is never called, and
PEFT cannot attach or load it everywhere; such modules are left out, or refused where the settings ask for them alone.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from fedlora.data.schema import Schema
from fedlora.errors import ModelError, nearest
from fedlora.sections import LoRAConfig

from .base_model import head_modules, is_inside

USUAL = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("c_attn",), ("qkv",), ("Wqkv",), ("q", "v"))
EVERY = ("all-linear",)
PASSED_ON = ("x_proj", "dt_proj", "out_proj")  # of a Mamba mixer: layers whose weights its kernels take uncalled
NARROW = 0.02  # the share of the weights that may be left out as narrower than the rank, as routers and gates are

OUTPUT = "the output layer, which scores the words"
FUSED = "its name means the fused experts to PEFT, which are a parameter and no layer"
EXPERTS = "experts that are fused in a parameter, for which there is no layer to adapt"
KERNEL = "the model takes its weight without calling it, so that an adapter would have no effect"
ROUTER = "it is a router, which gives more than a product of its weights"
UNCALLED = "the run's examples never pass through it"
ADAPTED = "an adapter goes on linear layers outside the head alone"
TWICE = "the model has this one layer in several places, and PEFT would adapt one of them"

Modules = Mapping[str, Any]  # name -> module of the base, or PEFT's layer around it


@dataclass(frozen=True)
class AdaptedModules:
    """The modules to adapt, how to name them to PEFT, what is left out, and what is trained whole."""

    modules: Modules
    names: tuple[str, ...]  # whole names, or ends of names that no other module has
    left_out: Mapping[str, str]  # name -> the reason, of what was asked for
    heads: tuple[str, ...]  # modules that are trained whole


@dataclass(frozen=True)
class Coverage:
    """How far an adapter reaches into its base model, to be told before a run."""

    adapted: Mapping[str, int]  # the last part of a module's name -> how many modules so called are adapted
    layers: int  # numbered layers of the model with an adapter in them
    of_layers: int  # numbered layers that the model has
    left_out: Mapping[str, tuple[str, int]]  # the last part of a name -> the reason, and how many such were left out
    heads: tuple[str, ...]  # modules that are trained whole


def find_targets(
    net: nn.Module, lora: LoRAConfig, schema: Schema, new: Sequence[str], called: Collection[str] | None = None
) -> AdaptedModules:
    """The modules to adapt, by `lora.targets`.

    `new` are the modules that the checkpoint lacks; `called` those that run when the model computes, None where that is
    not known. PEFT takes ends of names, as the settings do; where these would also catch a module that is left out, it
    gets whole names.

    Raises `ModelError` for a target that no module has, or that only modules have that cannot be adapted.
    """
    heads = tuple(head_modules(net, new)) if schema.has_head else ()
    body = _body(net, heads)
    wanted = lora.targets or _usual_targets(body)
    if wanted == EVERY:
        reasons = _left_out_of_all(net, body, lora, called)
        found = _without(reasons, body)
        return AdaptedModules(found, tuple(found), reasons | _fused_experts(net), heads)
    _check_targets(net, wanted, body)
    asked = {name: module for name, module in body.items() if _ends(name, *wanted)}
    reasons = _reasons(net, asked, called)
    _check_some_fit(net, wanted, asked, reasons)
    found = _without(reasons, asked)
    return AdaptedModules(found, _names(net, wanted, found), reasons, heads)


def _body(net: nn.Module, heads: Sequence[str]) -> dict[str, Any]:
    """The linear modules that are no head, nor within one; raises `ModelError` where there is none."""
    body = {name: module for name, module in linear_modules(net).items() if not _is_part(name, heads)}
    if not body:
        raise ModelError(
            f"{type(net).__name__} has no linear layer outside its head, and an adapter goes on nothing else; choose "
            "another model"
        )
    return body


def _names(net: nn.Module, wanted: tuple[str, ...], found: Modules) -> tuple[str, ...]:
    """The ends of names that were asked for, if they catch just these modules, else whole names."""
    caught = [name for name in linear_modules(net) if _ends(name, *wanted)]
    return wanted if len(found) == len(caught) else tuple(found)


def _without(reasons: Mapping[str, str], modules: Modules) -> dict[str, Any]:
    """The modules for which there is no reason to leave them out."""
    return {name: module for name, module in modules.items() if name not in reasons}


def _left_out_of_all(net: Any, body: Modules, lora: LoRAConfig, called: Collection[str] | None) -> dict[str, str]:
    """Why modules are left out of all linear ones: the output layer, what cannot be adapted, and narrow routers.

    Raises `ModelError` where nothing is left.
    """
    output = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    reasons = _reasons(net, body, called) | {name: OUTPUT for name, module in body.items() if module is output}
    reasons |= _too_narrow(_without(reasons, body), lora)
    reasons |= {name: ROUTER for name, module in _without(reasons, body).items() if _is_router(module)}
    if len(reasons) == len(body):
        raise ModelError(f"{type(net).__name__} has no linear layer that takes an adapter: {_first(reasons)}")
    return reasons


def _first(reasons: Mapping[str, str]) -> str:
    """The first module with its reason, in words."""
    return next(f"{name} is left out, as {reason}" for name, reason in reasons.items())


def _check_some_fit(net: nn.Module, wanted: Iterable[str], asked: Modules, reasons: Mapping[str, str]) -> None:
    """Raise `ModelError` where a target names only modules that cannot be adapted."""
    for target in wanted:
        named = [name for name in asked if _ends(name, target)]
        if all(name in reasons for name in named):
            raise ModelError(
                f"lora.targets: {named[0]} of {type(net).__name__} cannot be adapted: {reasons[named[0]]}; leave "
                f'"{target}" out'
            )


def _reasons(net: nn.Module, modules: Modules, called: Collection[str] | None) -> dict[str, str]:
    """Why modules cannot be adapted, by the names of those that cannot."""
    fused = {end for end in set(map(last_part, modules)) if _means_experts(net, end)}
    twice = _named_twice(net)
    found: dict[str, str] = {}
    for name in modules:
        if reason := _reason(net, name, fused, twice, called):
            found[name] = reason
    return found


def _reason(
    net: nn.Module, name: str, fused: Collection[str], twice: Collection[str], called: Collection[str] | None
) -> str:
    """Why a module cannot be adapted; empty if it can. An expert that was not called may be so for other words."""
    if last_part(name) in fused:
        return FUSED
    if _is_passed_on(net.get_submodule(name.rpartition(".")[0]), last_part(name)):
        return KERNEL
    if name in twice:
        return TWICE
    return UNCALLED if called is not None and name not in called and "expert" not in name else ""


def _means_experts(net: nn.Module, end: str) -> bool:
    """Does PEFT, with transformers 5, take this end of a name for parameters of fused experts?"""
    config = LoraConfig(target_modules=[end])
    try:
        convert_peft_config_for_transformers(config, net, None)
    except ValueError:  # it wants the names of all that is fused together
        return True
    return end not in (config.target_modules or ())


def _is_passed_on(parent: nn.Module, end: str) -> bool:
    """Does a module hand the weight of this part of it to a kernel, instead of calling it?

    PyTorch's attention does, and the mixers of state-space models; linear attention, which has no D, does not.
    """
    if isinstance(parent, nn.MultiheadAttention):
        return True
    return end in PASSED_ON and hasattr(parent, "A_log") and hasattr(parent, "D")


def _named_twice(net: nn.Module) -> set[str]:
    """The names of linear modules that are also in another place under another name."""
    places = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False) if _is_linear(module))
    return {name for name, module in net.named_modules() if places[id(module)] > 1}


def _too_narrow(modules: Modules, lora: LoRAConfig) -> dict[str, str]:
    """The modules that are narrower than the rank, with the reason, if they have a small share of the weights.

    Such are the routers of experts and the gates of a head. Where it is more, the rank is to be refused.
    """
    if lora.kind == "vera":
        return {}
    narrow = {name: min(shape(module)) for name, module in modules.items() if min(shape(module)) < lora.rank}
    weights = {name: shape(module)[0] * shape(module)[1] for name, module in modules.items()}
    if sum(weights[name] for name in narrow) > NARROW * sum(weights.values()):
        return {}
    return {name: f"it is {width} wide, less than the rank" for name, width in narrow.items()}


def _fused_experts(net: nn.Module) -> dict[str, str]:
    """The parameters that hold all experts of a layer, (experts, d_out, d_in) each."""
    stacked = (name for name, p in net.named_parameters() if p.dim() == 3 and len(p) > 1)
    return {name: EXPERTS for name in stacked if "expert" in name or "moe" in name}


def coverage(net: nn.Module, targets: AdaptedModules) -> Coverage:
    """How far an adapter on these modules of a model, which has none yet, reaches into it."""
    inside = [name for name, _ in net.named_parameters() if not _is_part(name, targets.heads)]
    return Coverage(
        adapted=dict(Counter(map(last_part, targets.modules))),
        layers=len(_layers(targets.modules)),
        of_layers=len(_layers(inside)),
        left_out={end: _summed(end, targets.left_out) for end in dict.fromkeys(map(last_part, targets.left_out))},
        heads=targets.heads,
    )


def _summed(end: str, left_out: Mapping[str, str]) -> tuple[str, int]:
    """Why modules whose names end so are left out, and how many."""
    reasons = [reason for name, reason in left_out.items() if last_part(name) == end]
    return ", or ".join(dict.fromkeys(reasons)), len(reasons)


def reach_notes(found: Coverage, lora: LoRAConfig) -> list[str]:
    """What is to be told of an adapter that leaves whole layers as they are, where the settings do not ask for it."""
    if lora.targets or found.layers == found.of_layers:
        return []
    ends = ", ".join(found.adapted)
    return [
        f"{found.layers} of {found.of_layers} layers have an adapter, on {ends}; lora.targets = all-linear reaches more"
    ]


def _layers(names: Iterable[str]) -> set[str]:
    """The numbered layers that these modules lie in: `model.layers.3`."""
    return {found[1] for found in (re.match(r"(.*?\.\d+)\.", name) for name in names) if found}


def linear_modules(net: nn.Module) -> dict[str, Any]:
    """The linear modules of a model, by name."""
    return {name: module for name, module in net.named_modules() if _is_linear(module)}


def _check_targets(net: nn.Module, wanted: Iterable[str], names: Iterable[str]) -> None:
    """Raise `ModelError` for a target that none of the names ends with."""
    names = tuple(names)
    for target in wanted:
        if not any(_ends(name, target) for name in names):
            raise ModelError(f"lora.targets: {_no_such_module(net, target, set(map(last_part, names)))}")


def _no_such_module(net: nn.Module, target: str, ends: set[str]) -> str:
    """What to say of a target that is no linear module outside the head."""
    other = next((module for name, module in net.named_modules() if _ends(name, target)), None)
    if other is not None:
        kind = type(other).__name__
        return f'"{target}" of {type(net).__name__} is of the type {kind}, or in the head; {ADAPTED}'
    if _means_experts(net, target) or any(_ends(name, target) for name in _fused_experts(net)):
        return f'"{target}" of {type(net).__name__} is in {EXPERTS}; leave it out, or take all-linear'
    return f'{type(net).__name__} has no module "{target}"; {nearest(target, ends)}'


def _usual_targets(names: Iterable[str]) -> tuple[str, ...]:
    """The attention's modules under the names of a known architecture; of an unknown one, all linear modules."""
    ends = set(map(last_part, names))
    return next((targets for targets in USUAL if ends.issuperset(targets)), EVERY)


def last_part(name: str) -> str:
    """What stands behind the last dot of a name."""
    return name.rsplit(".", 1)[-1]


def _ends(name: str, *ends: str) -> bool:
    """Does a dotted name end with all the parts of one of these?"""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _is_part(name: str, modules: Collection[str]) -> bool:
    """Is a module one of these, or within one?"""
    return name in modules or is_inside(name, modules)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_router(module: nn.Module) -> bool:
    """Is it a kind of linear layer that chooses experts? Falcon's kind, which only multiplies, is none."""
    return isinstance(module, nn.Linear) and "Router" in type(module).__name__


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies transposed."""
    return type(module).__name__ == "Conv1D"


def shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in)"""
    return (module.nf, module.nx) if is_conv1d(module) else (module.out_features, module.in_features)
