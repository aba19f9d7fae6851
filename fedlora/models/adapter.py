"""Putting an adapter on a base model, and an offset under it. Only this, model and reload know PEFT.

Every kind has its A and B: LoRA and DoRA the matrices (r, d_in) and (d_out, r); VeRA, whose matrices are random, frozen
and shared by all modules, the vectors d (r,) and b (d_out,) of diag(b) B diag(d) A (https://arxiv.org/abs/2310.11454).
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn

from fedlora.data.schema import Form
from fedlora.errors import DataError, ModelError, nearest
from fedlora.sections import LoRAConfig
from fedlora.seeds import derive, seeded

NAME = "default"  # PEFT's name of the one adapter
PREFIX = "base_model.model."  # what PEFT puts before a module's name
USUAL = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("c_attn",), ("qkv",), ("Wqkv",), ("q", "v"))
TASKS = {"label": TaskType.SEQ_CLS, "image": None}
INITS: dict[str, Any] = {"gaussian": "gaussian", "orthonormal": "gaussian", "pissa": "pissa", "olora": "olora"}
INPUTS = 1024  # of a module, that eva looks at


Modules = Mapping[str, Any]  # name -> module of the base, or PEFT's layer around it


def wear(net: nn.Module, lora: LoRAConfig, form: Form, new: Sequence[str], seed: int) -> PeftModel:
    """The model with a fresh adapter, and its head, where it has one, as a part to train; the base is as it was.

    `new` are the modules that are to be learned from nothing. Raises `ModelError` where the model cannot wear it.
    """
    heads = _heads(net, new) if form.labels else []
    modules, targets = _targets(net, lora.targets, heads)
    _check(lora, modules)
    config = _config(lora, modules, seed)
    config.target_modules, config.modules_to_save = set(targets), heads or None
    config.task_type = TASKS.get(form.kind, TaskType.CAUSAL_LM)
    # PiSSA and OLoRA take their start out of the weights; here the base stays, and whoever wants it takes it off again.
    before = [(m, m.weight, m.weight.detach().clone()) for m in modules.values() if lora.init in ("pissa", "olora")]
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT finds GPT-2's Conv1D by itself, and says so
        worn: PeftModel = get_peft_model(net, config)
    for module, weight, values in before:
        weight.data = values
        module.weight = weight  # PEFT puts another in the place of a quantised one
    _settle(layers(worn), lora.init)
    return worn


def _config(lora: LoRAConfig, modules: Modules, seed: int) -> Any:
    """PEFT's configuration of the adapter, but for where it goes."""
    if lora.kind == "vera":
        return VeraConfig(r=lora.rank, vera_dropout=lora.dropout, projection_prng_key=derive(seed, "vera"))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float is well for PEFT, and said to be an int
        use_rslora=lora.rslora,
        use_dora=lora.kind == "dora",
        lora_dropout=lora.dropout,
        init_lora_weights=INITS.get(lora.init, True),
        rank_pattern=exactly({m: int(r) for m, r in _matched(lora, "rank_pattern", modules).items()}),
        alpha_pattern=exactly(_matched(lora, "alpha_pattern", modules)),
    )


def layers(net: nn.Module) -> dict[str, Any]:
    """PEFT's layers, by the names their modules have in the base."""
    return {n.removeprefix(PREFIX): m for n, m in net.named_modules() if isinstance(m, LoraLayer | VeraLayer)}


def side(letter: str, worn: Modules) -> dict[str, nn.Parameter]:
    """What stands for A, or B, in every module; see the head of this file."""

    def one(layer: Any) -> Any:
        if isinstance(layer, VeraLayer):
            return (layer.vera_lambda_d if letter == "A" else layer.vera_lambda_b)[NAME]
        return (layer.lora_A if letter == "A" else layer.lora_B)[NAME].weight

    return {name: one(layer) for name, layer in worn.items()}


def exactly(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT pattern of whole names; without the mark, a name would count for every module that ends so."""
    return {f"^{name}": value for name, value in pattern.items()}


@torch.no_grad()
def eva(worn: Modules, passes: Iterable[object]) -> None:
    """Start at A = the leading right singular vectors of each module's inputs, and B = 0.

    Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
    https://arxiv.org/abs/2410.07170, without its redistribution of ranks: from the first `INPUTS` inputs of a module,
    as they are, not centred. Each step of `passes` is to run the model once, without padding. Raises `DataError` where
    the inputs do not span as many directions as the rank has.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in worn}

    def look(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)  # (tokens, d_in)
            seen[name].append(rows[: INPUTS - sum(map(len, seen[name]))].cpu().double())

        return keep

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in worn.items()]
    for _ in passes:
        if all(sum(map(len, rows)) == INPUTS for rows in seen.values()):
            break
    for hook in hooks:
        hook.remove()
    for name, a in side("A", worn).items():
        x = torch.cat(seen[name]) if seen[name] else torch.zeros(0, a.shape[1])
        _, s, vh = torch.linalg.svd(x, full_matrices=False)
        spanned = int((s > 1e-6 * s[:1]).sum())
        if spanned < a.shape[0]:
            raise DataError(
                f"lora.init_data: its {len(x)} inputs of {name} span {spanned} directions, and the rank is "
                f"{a.shape[0]}; give more examples"
            )
        a.copy_(_signs(vh[: a.shape[0]]) * vh[: a.shape[0]])


@torch.no_grad()
def _settle(worn: Modules, init: str) -> None:
    """Make a start that is more than a draw the same on every machine: the sign of a row and its column is free."""
    if init not in ("orthonormal", "pissa", "olora"):
        return
    for a, b in zip(side("A", worn).values(), side("B", worn).values(), strict=True):
        if init == "orthonormal":
            a.copy_(torch.linalg.qr(a.double().T)[0].T)
        sign = _signs(a)
        a.mul_(sign)
        b.mul_(sign.T)


def _signs(a: Tensor) -> Tensor:
    """By which the entry of a row that is largest in absolute value becomes positive: (r, 1)."""
    return torch.where(a.gather(1, a.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0).to(a)


def _targets(net: nn.Module, wanted: tuple[str, ...], heads: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The modules to adapt, and how PEFT is told: by the ends of their names, where these catch nothing else."""
    linear: dict[str, Any] = {n: m for n, m in net.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    body = {n: m for n, m in linear.items() if not any(f"{n}.".startswith(f"{head}.") for head in heads)}
    ends = {name.rsplit(".", 1)[-1] for name in body}
    if not wanted:
        wanted = next((names for names in USUAL if ends.issuperset(names)), ("all-linear",))
    if wanted == ("all-linear",):
        output: Any = getattr(net, "get_output_embeddings", lambda: None)()
        found = {n: m for n, m in body.items() if m is not output}
        return found, list(found)
    for target in wanted:
        if not any(_ends(name, target) for name in body):
            raise ModelError(f'lora.targets: {type(net).__name__} has no module "{target}"; {nearest(target, ends)}')
    caught = {n for n in linear if any(_ends(n, target) for target in wanted)}
    found = {n: m for n, m in body.items() if n in caught}
    return found, list(wanted) if caught == set(found) else list(found)


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies transposed."""
    return type(module).__name__ == "Conv1D"


def _heads(net: nn.Module, new: Sequence[str]) -> list[str]:
    """What a classifier has beside its backbone, and what else is new; not what lies within another of these."""
    prefix = getattr(net, "base_model_prefix", "")
    own = [name for name, m in net.named_children() if name != prefix and any(True for _ in m.parameters())]
    every = sorted({*own, *new})
    return [name for name in every if not any(name.startswith(f"{other}.") for other in every)]


def _matched(lora: LoRAConfig, key: Literal["rank_pattern", "alpha_pattern"], modules: Modules) -> dict[str, float]:
    """The number of every module that a pattern names, where the name of most parts counts.

    `layers.0.q_proj` names `model.layers.0.self_attn.q_proj`: its parts stand there in order, and the last is the last.
    """
    found: dict[str, float] = {}
    for short, value in sorted(lora.pattern(key).items(), key=lambda item: item[0].count(".")):
        named = [name for name in modules if _named(name.split("."), short.split("."))]
        if not named:
            known = modules if "." in short else {name.rsplit(".", 1)[-1] for name in modules}
            raise ModelError(f'lora.{key}: no adapted module has the name "{short}"; {nearest(short, known)}')
        found |= dict.fromkeys(named, value)
    return found


def _named(parts: list[str], short: list[str]) -> bool:
    rest = iter(parts)
    return parts[-1] == short[-1] and all(part in rest for part in short)


def _check(lora: LoRAConfig, modules: Modules) -> None:
    """Refuse a rank above full rank, and a start that PEFT cannot take from these weights."""
    ranks = _matched(lora, "rank_pattern", modules)
    full = {name: min(_shape(module)) for name, module in modules.items()}
    for name, module in modules.items():
        key, rank = ("lora.rank_pattern", ranks[name]) if name in ranks else ("lora.rank", lora.rank)
        if lora.kind != "vera" and rank > full[name]:
            d_out, d_in = _shape(module)
            raise ModelError(
                f"{key} = {rank:g} is above the smaller dimension of {name} ({d_out} x {d_in}); "
                f"choose a rank of at most {min(full.values()) if key == 'lora.rank' else full[name]}"
            )
        if lora.init == "olora" and _is_conv1d(module):
            raise ModelError(f"lora.init = olora: PEFT cannot take it from {name}, a Conv1D; choose pissa")
        if lora.init == "pissa" and not module.weight.is_floating_point():
            raise ModelError(
                f"lora.init = pissa: the weight of {name} is quantised; set model.quantize = none, or olora"
            )


def _shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in)"""
    return (module.nf, module.nx) if _is_conv1d(module) else (module.out_features, module.in_features)
