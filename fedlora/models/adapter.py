"""An adapter attached to a base model by PEFT: which modules it adapts, how it starts, and what is its A and its B.

LoRA and DoRA have the matrices A (r, d_in) and B (d_out, r). VeRA's matrices are random, frozen and shared by all
modules; its vectors d (r,) and b (d_out,) of diag(b) B diag(d) A stand for A and B (https://arxiv.org/abs/2310.11454).
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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

from .adapted_modules import AdaptedModules, Modules, is_conv1d, last_part, shape
from .base_model import is_encoder_decoder

NAME = "default"  # PEFT's name of the one adapter
PREFIX = "base_model.model."  # what PEFT puts before a module's name
INITS: dict[str, Any] = {"gaussian": "gaussian", "orthonormal": "gaussian", "pissa": "pissa", "olora": "olora"}
FROM_WEIGHTS = ("pissa", "olora")  # starts for which PEFT takes A and B out of the weights, and changes these
INPUTS = 1024  # of a module, that eva looks at


def attach_adapter(net: nn.Module, lora: LoRAConfig, schema: Schema, targets: AdaptedModules, seed: int) -> PeftModel:
    """The model with a fresh adapter attached, and with its heads, if it has any, ready to train; its weights stay.

    Raises `ModelError` if the model cannot take this adapter.
    """
    _check(lora, targets.modules)
    config = _config(lora, targets.modules, seed)
    config.target_modules = set(targets.names)
    config.modules_to_save = list(targets.heads) or None
    config.task_type = _task(net, schema)
    # PEFT subtracts the start of PiSSA and OLoRA from the weights. Here the weights are restored, as every client has
    # the same base, and a strategy subtracts the start (see strategies/anchored.py).
    before = _weights(targets.modules) if lora.init in FROM_WEIGHTS else []
    with seeded(seed):
        adapted = _attached(net, config)
    for module, weight, values in before:
        weight.data = values
        module.weight = weight  # PEFT puts another in the place of a quantised one
    _check_attached(adapted, targets)
    fix_signs(layers(adapted), lora.init)
    train_heads_in_float32(adapted)
    return adapted


def _task(net: nn.Module, schema: Schema) -> TaskType | None:
    """PEFT's name of what the model learns; it has none for images."""
    if schema.has_head:
        return TaskType.SEQ_CLS if schema.kind == "label" else None
    return TaskType.SEQ_2_SEQ_LM if is_encoder_decoder(net) else TaskType.CAUSAL_LM


def _attached(net: nn.Module, config: Any) -> PeftModel:
    """The model as PEFT wraps it; raises `ModelError` with PEFT's reason where it refuses."""
    try:
        with quiet():
            adapted: PeftModel = get_peft_model(net, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as e:
        said = " ".join(str(e).split())[:300] or type(e).__name__
        raise ModelError(
            f"PEFT cannot attach this adapter to {type(net).__name__}: {said}; choose other lora.targets, or another "
            "lora.kind or lora.init"
        ) from e
    return adapted


@contextmanager
def quiet() -> Iterator[None]:
    """Keep PEFT from warning of what is taken care of here: GPT-2's Conv1D, and output layers that are tied."""
    with warnings.catch_warnings():
        for said in ("fan_in_fan_out", "Model has `tie_word_embeddings"):
            warnings.filterwarnings("ignore", said)
        yield


def _check_attached(adapted: nn.Module, targets: AdaptedModules) -> None:
    """Raise `ModelError` where PEFT has adapted other modules than these, or has another head."""
    found = layers(adapted)
    saved = {name.removeprefix(PREFIX) for name, m in adapted.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    differ = sorted({*found} ^ {*targets.modules}) + sorted(saved ^ {*targets.heads})
    if differ:
        raise ModelError(
            f"PEFT does not adapt just what it is asked to: {differ[0]} is the first of {len(differ)} modules that "
            "differ, and its file could not be loaded as it was evaluated; name other modules in lora.targets"
        )


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


def tied(net: nn.Module, adapted: Modules) -> list[str]:
    """The adapted modules whose weight is that of another module too, as an output layer's may be the embedding's."""
    places = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
    return [name for name, layer in adapted.items() if places[id(layer.get_base_layer().weight)] > 1]


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


def _matched(lora: LoRAConfig, key: Literal["rank_pattern", "alpha_pattern"], modules: Modules) -> dict[str, float]:
    """The number of every module that a pattern names; of several names for a module, the one of most parts counts.

    `layers.0.q_proj` names `model.layers.0.self_attn.q_proj`: its parts stand there in order, and the last is the last.
    Raises `ModelError` for a name that no module has.
    """
    numbers: dict[str, float] = {}
    for short, value in sorted(lora.pattern(key).items(), key=lambda item: item[0].count(".")):
        named = [name for name in modules if _is_short_for(short, name)]
        if not named:
            known = modules if "." in short else set(map(last_part, modules))
            raise ModelError(f'lora.{key}: no adapted module has the name "{short}"; {nearest(short, known)}')
        numbers |= dict.fromkeys(named, value)
    return numbers


def _is_short_for(short: str, name: str) -> bool:
    """Do the parts of a short name occur in this order in the name, the last as its last?"""
    rest = iter(name.split("."))
    return last_part(name) == last_part(short) and all(part in rest for part in short.split("."))


def _check(lora: LoRAConfig, modules: Modules) -> None:
    """Raise `ModelError` for a rank above full rank, and for a start that PEFT cannot take from these weights."""
    if lora.kind != "vera":
        _check_ranks(lora, modules)
    for name, module in modules.items():
        _check_start(lora.init, name, module)


def _check_start(init: str, name: str, module: Any) -> None:
    if init == "olora" and is_conv1d(module):
        raise ModelError(f"lora.init = olora: PEFT cannot take it from {name}, a Conv1D; choose pissa")
    if init == "pissa" and not module.weight.is_floating_point():
        raise ModelError(f"lora.init = pissa: the weight of {name} is quantised; set model.quantize = none, or olora")


def _check_ranks(lora: LoRAConfig, modules: Modules) -> None:
    ranks = _matched(lora, "rank_pattern", modules)
    full = {name: min(shape(module)) for name, module in modules.items()}
    for name, module in modules.items():
        rank = ranks.get(name, lora.rank)
        if rank > full[name]:
            d_out, d_in = shape(module)
            key, most = ("rank_pattern", full[name]) if name in ranks else ("rank", min(full.values()))
            raise ModelError(
                f"lora.{key} = {rank:g} is above the smaller dimension of {name} ({d_out} x {d_in}); "
                f"choose a rank of at most {most}"
            )
