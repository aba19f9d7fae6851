"""An adapter attached to a base model by PEFT: which modules it adapts, how it starts, and what is its A and its B.

LoRA and DoRA have the matrices A (r, d_in) and B (d_out, r). VeRA's matrices are random, frozen and shared by all
modules; its vectors d (r,) and b (d_out,) of diag(b) B diag(d) A stand for A and B (https://arxiv.org/abs/2310.11454).
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.vera import VeraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedlora.data.schema import Schema
from fedlora.errors import DataError, ModelError, nearest
from fedlora.sections import LoRAConfig
from fedlora.seeds import derive, seeded
from fedlora.svd import row_signs

from .base_model import head_modules, is_encoder_decoder, is_inside

NAME = "default"  # PEFT's name of the one adapter
PREFIX = "base_model.model."  # what PEFT puts before a module's name
USUAL = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("c_attn",), ("qkv",), ("Wqkv",), ("q", "v"))
INITS: dict[str, Any] = {"gaussian": "gaussian", "orthonormal": "gaussian", "pissa": "pissa", "olora": "olora"}
FROM_WEIGHTS = ("pissa", "olora")  # starts for which PEFT takes A and B out of the weights, and changes these
INPUTS = 1024  # of a module, that eva looks at

Modules = Mapping[str, Any]  # name -> module of the base, or PEFT's layer around it


def attach_adapter(net: nn.Module, lora: LoRAConfig, schema: Schema, new: Sequence[str], seed: int) -> PeftModel:
    """The model with a fresh adapter attached, and with its head, if it has one, ready to train; its weights stay.

    `new` are the modules that the checkpoint lacks, to be learned from nothing. Raises `ModelError` if the model cannot
    take this adapter.
    """
    heads = head_modules(net, new) if schema.has_head else []
    modules, targets = _targets(net, lora.targets, heads)
    _check(lora, modules)
    config = _config(lora, modules, seed)
    config.target_modules = set(targets)
    config.modules_to_save = heads or None
    config.task_type = _task(net, schema)
    # PEFT subtracts the start of PiSSA and OLoRA from the weights. Here the weights are restored, as every client has
    # the same base, and a strategy subtracts the start (see strategies/anchored.py).
    before = _weights(modules) if lora.init in FROM_WEIGHTS else []
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT finds GPT-2's Conv1D by itself, and says so
        adapted: PeftModel = get_peft_model(net, config)
    for module, weight, values in before:
        weight.data = values
        module.weight = weight  # PEFT puts another in the place of a quantised one
    fix_signs(layers(adapted), lora.init)
    train_heads_in_float32(adapted)
    return adapted


def _task(net: nn.Module, schema: Schema) -> TaskType | None:
    """PEFT's name of what the model learns; it has none for images."""
    if schema.has_head:
        return TaskType.SEQ_CLS if schema.kind == "label" else None
    return TaskType.SEQ_2_SEQ_LM if is_encoder_decoder(net) else TaskType.CAUSAL_LM


def _weights(modules: Modules) -> list[tuple[Any, nn.Parameter, Tensor]]:
    """Every module with its weight, and a copy of the weight's numbers."""
    return [(module, module.weight, module.weight.detach().clone()) for module in modules.values()]


def _config(lora: LoRAConfig, modules: Modules, seed: int) -> Any:
    """PEFT's configuration of the adapter, but for the modules that it adapts."""
    if lora.kind == "vera":
        return VeraConfig(r=lora.rank, vera_dropout=lora.dropout, projection_prng_key=derive(seed, "vera"))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes a float, though it is declared an int
        use_rslora=lora.rslora,
        use_dora=lora.kind == "dora",
        lora_dropout=lora.dropout,
        init_lora_weights=INITS.get(lora.init, True),
        rank_pattern=exactly({m: int(r) for m, r in _matched(lora, "rank_pattern", modules).items()}),
        alpha_pattern=exactly(_matched(lora, "alpha_pattern", modules)),
    )


def train_heads_in_float32(net: nn.Module) -> None:
    """Hold the modules that are trained whole in float32, whatever the base is in, as PEFT does with A and B.

    In half precision most steps would be smaller than the last digit of a weight, and the epsilon of Adam zero.
    """
    for module in net.modules():
        if isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save[NAME]
            dtypes = {p.dtype for p in head.parameters()} - {torch.float32}
            if dtypes:
                head.float()
                head.register_forward_pre_hook(partial(_inputs_to, torch.float32), with_kwargs=True)
                head.register_forward_hook(partial(_output_to, dtypes.pop()))


def _inputs_to(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return _in(dtype, args), _in(dtype, kwargs)


def _output_to(dtype: torch.dtype, _: nn.Module, args: Any, output: Any) -> Any:
    return _in(dtype, output)


def _in(dtype: torch.dtype, values: Any) -> Any:
    """The same values with every tensor of floating point in this type."""
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def layers(net: nn.Module) -> dict[str, Any]:
    """PEFT's layers, by the names that their modules have in the base."""
    return {n.removeprefix(PREFIX): m for n, m in net.named_modules() if isinstance(m, LoraLayer | VeraLayer)}


def side(letter: str, adapted: Modules) -> dict[str, nn.Parameter]:
    """The parameter that stands for A, or B, in every layer; see the head of this file."""
    return {name: _factor(letter, layer) for name, layer in adapted.items()}


def _factor(letter: str, layer: Any) -> Any:
    if isinstance(layer, VeraLayer):
        return (layer.vera_lambda_d if letter == "A" else layer.vera_lambda_b)[NAME]
    return (layer.lora_A if letter == "A" else layer.lora_B)[NAME].weight


def exactly(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT pattern of whole names; without the mark, a name would count for every module that ends so."""
    return {f"^{name}": value for name, value in pattern.items()}


@torch.no_grad()
def eva(adapted: Modules, passes: Iterable[object]) -> None:
    """Start at A = the leading right singular vectors of each module's inputs, and B = 0.

    Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation,
    https://arxiv.org/abs/2410.07170, without its redistribution of ranks: from the first `INPUTS` inputs of a module,
    as they are, not centred. Each step of `passes` is to run the model once, without padding. Raises `DataError` where
    the inputs do not span as many directions as the rank has.
    """
    inputs = _first_inputs(adapted, passes)
    for name, a in side("A", adapted).items():
        rank = a.shape[0]
        _, s, vh = torch.linalg.svd(inputs[name], full_matrices=False)
        spanned = int((s > 1e-6 * s[:1]).sum())
        if spanned < rank:
            raise DataError(
                f"lora.init_data: its {len(inputs[name])} inputs of {name} span {spanned} directions, and the rank is "
                f"{rank}; give more examples"
            )
        leading = vh[:rank]
        a.copy_(row_signs(leading) * leading)


def _first_inputs(adapted: Modules, passes: Iterable[object]) -> dict[str, Tensor]:
    """The first `INPUTS` inputs of every module while the model runs, in float64: (at most INPUTS, d_in)."""
    seen = {name: torch.zeros(0, layer.in_features, dtype=torch.float64) for name, layer in adapted.items()}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].flatten(0, -2)  # (tokens, d_in)
            seen[name] = torch.cat([seen[name], tokens[: INPUTS - len(seen[name])].cpu().double()])

        return record

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in adapted.items()]
    for _ in passes:
        if all(len(rows) == INPUTS for rows in seen.values()):
            break
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def fix_signs(adapted: Modules, init: str) -> None:
    """Fix the signs of a start from a decomposition, which are free for a row of A and its column of B together.

    So the start is the same on every machine. A start that is merely drawn stays as it is.
    """
    if init not in ("orthonormal", "pissa", "olora"):
        return
    for a, b in zip(side("A", adapted).values(), side("B", adapted).values(), strict=True):
        if init == "orthonormal":
            a.copy_(torch.linalg.qr(a.double().T)[0].T)
        sign = row_signs(a)
        a.mul_(sign)
        b.mul_(sign.T)


def _targets(net: nn.Module, wanted: tuple[str, ...], heads: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The modules to adapt, and the names to give PEFT for them.

    PEFT takes ends of names, as the settings do; where these would also catch a module of a head, it gets whole names.
    Raises `ModelError` for a target that no module has.
    """
    linear = _linear_modules(net)
    body = _outside(heads, linear)
    wanted = wanted or _usual_targets(body)
    if wanted == ("all-linear",):
        found = _all_but_output(net, body)
        return found, list(found)
    _check_targets(net, wanted, body)
    caught = [name for name in linear if _ends(name, *wanted)]
    found = {name: body[name] for name in caught if name in body}
    return found, list(wanted if len(found) == len(caught) else found)


def _linear_modules(net: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in net.named_modules() if _is_linear(module)}


def _outside(heads: Sequence[str], modules: Modules) -> dict[str, Any]:
    """The modules that are no head, nor within one."""
    return {name: module for name, module in modules.items() if not _is_part(name, heads)}


def _all_but_output(net: Any, linear: Modules) -> dict[str, Any]:
    """The linear modules without the layer that scores the words of a language model, if there is one."""
    output = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    return {name: module for name, module in linear.items() if module is not output}


def _check_targets(net: nn.Module, wanted: Iterable[str], names: Iterable[str]) -> None:
    """Raise `ModelError` for a target that none of the names ends with."""
    for target in wanted:
        if not any(_ends(name, target) for name in names):
            ends = set(map(_last_part, names))
            raise ModelError(f'lora.targets: {type(net).__name__} has no module "{target}"; {nearest(target, ends)}')


def _usual_targets(names: Iterable[str]) -> tuple[str, ...]:
    """The attention's modules under the names of a known architecture; of an unknown one, all linear modules."""
    ends = set(map(_last_part, names))
    return next((targets for targets in USUAL if ends.issuperset(targets)), ("all-linear",))


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _ends(name: str, *ends: str) -> bool:
    """Does a dotted name end with all the parts of one of these?"""
    return f".{name}".endswith(tuple(f".{end}" for end in ends))


def _is_part(name: str, modules: Sequence[str]) -> bool:
    """Is a module one of these, or within one?"""
    return name in modules or is_inside(name, modules)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies transposed."""
    return type(module).__name__ == "Conv1D"


def _matched(lora: LoRAConfig, key: Literal["rank_pattern", "alpha_pattern"], modules: Modules) -> dict[str, float]:
    """The number of every module that a pattern names; of several names for a module, the one of most parts counts.

    `layers.0.q_proj` names `model.layers.0.self_attn.q_proj`: its parts stand there in order, and the last is the last.
    Raises `ModelError` for a name that no module has.
    """
    numbers: dict[str, float] = {}
    for short, value in sorted(lora.pattern(key).items(), key=lambda item: item[0].count(".")):
        named = [name for name in modules if _is_short_for(short, name)]
        if not named:
            known = modules if "." in short else set(map(_last_part, modules))
            raise ModelError(f'lora.{key}: no adapted module has the name "{short}"; {nearest(short, known)}')
        numbers |= dict.fromkeys(named, value)
    return numbers


def _is_short_for(short: str, name: str) -> bool:
    """Do the parts of a short name occur in this order in the name, the last as its last?"""
    rest = iter(name.split("."))
    return _last_part(name) == _last_part(short) and all(part in rest for part in short.split("."))


def _check(lora: LoRAConfig, modules: Modules) -> None:
    """Raise `ModelError` for a rank above full rank, and for a start that PEFT cannot take from these weights."""
    if lora.kind != "vera":
        _check_ranks(lora, modules)
    for name, module in modules.items():
        _check_start(lora.init, name, module)


def _check_start(init: str, name: str, module: Any) -> None:
    if init == "olora" and _is_conv1d(module):
        raise ModelError(f"lora.init = olora: PEFT cannot take it from {name}, a Conv1D; choose pissa")
    if init == "pissa" and not module.weight.is_floating_point():
        raise ModelError(f"lora.init = pissa: the weight of {name} is quantised; set model.quantize = none, or olora")


def _check_ranks(lora: LoRAConfig, modules: Modules) -> None:
    ranks = _matched(lora, "rank_pattern", modules)
    full = {name: min(_shape(module)) for name, module in modules.items()}
    for name, module in modules.items():
        rank = ranks.get(name, lora.rank)
        if rank > full[name]:
            d_out, d_in = _shape(module)
            key, most = ("rank_pattern", full[name]) if name in ranks else ("rank", min(full.values()))
            raise ModelError(
                f"lora.{key} = {rank:g} is above the smaller dimension of {name} ({d_out} x {d_in}); "
                f"choose a rank of at most {most}"
            )


def _shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in)"""
    return (module.nf, module.nx) if _is_conv1d(module) else (module.out_features, module.in_features)
