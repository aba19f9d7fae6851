"""Base models in 8 or 4 bits, by bitsandbytes: on a GPU, and on a CPU too.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (NeurIPS 2023), https://arxiv.org/abs/2305.14314: 4 bits
are NF4 with double quantisation. 8 bits are whole numbers with a scale a row.

Two things that bitsandbytes does by itself are left out. LLM.int8() rounds the inputs of a layer too, and picks the
columns that it leaves whole by the largest number in the batch, so that a row's numbers would depend on its neighbours
(and DP-SGD's clipped gradients with them); on a CPU it does so in evaluation alone. And on a CPU with AVX512-BF16 the
first evaluation packs 4-bit weights for a kernel in bfloat16 that has no gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.sections import ModelConfig


def options(config: ModelConfig, device: torch.device, whole: Sequence[str] = ()) -> dict[str, Any]:
    """Options for transformers to quantise the weights as `model.quantize` says; none for "none".

    `whole` are modules that keep their numbers as they are, beside those that transformers keeps by itself where there
    are none. Raises `ModelError` without bitsandbytes, or on a device that it has no kernels for.
    """
    if config.quantize == "none":
        return {}
    try:
        import bitsandbytes
    except ImportError as e:
        raise ModelError(
            f"model.quantize = {config.quantize} needs bitsandbytes: pip install 'fedlora[quantized]'"
        ) from e
    if device.type not in bitsandbytes.supported_torch_devices:
        raise ModelError(
            f"model.quantize = {config.quantize}: bitsandbytes {bitsandbytes.__version__} has no kernels for "
            f"model.device = {device}; choose cpu or cuda, or leave model.quantize at none"
        )
    from transformers import BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4["bnb_4bit_compute_dtype"] = getattr(torch, config.dtype)
    chosen: dict[str, Any] = {"load_in_8bit": True} if config.quantize == "8bit" else nf4
    made: Any = BitsAndBytesConfig  # untyped
    return {
        "quantization_config": made(**chosen, llm_int8_skip_modules=list(whole) or None),
        "device_map": {"": str(device)},
    }


def is_quantized(module: nn.Module) -> bool:
    """Whether this is one of bitsandbytes's linear layers."""
    return type(module).__name__ in LAYERS


def left_whole(net: nn.Module, trained: Sequence[str]) -> list[str]:
    """The modules to load again as they are, where some that are trained whole were quantised; else none.

    With them come those that transformers leaves whole by itself, as a list of one's own takes their place.
    """
    if not any(is_quantized(module) for name in trained for module in net.get_submodule(name).modules()):
        return []
    outputs = [
        name for name, module in net.named_modules() if isinstance(module, nn.Linear) and not is_quantized(module)
    ]
    return sorted({*outputs, *trained})


def settle(net: nn.Module) -> None:
    """Have the quantised layers compute every row by itself, the same in training and in evaluation."""
    for module in net.modules():
        if is_quantized(module):
            LAYERS[type(module).__name__](module)


def refuse_other(config: ModelConfig, source: str, checkpoint: Any) -> None:
    """Raise `ModelError` for a checkpoint that is quantised already, in another way than `model.quantize` says.

    `checkpoint` is transformers' configuration of it.
    """
    stored = getattr(checkpoint, "quantization_config", None)
    if not stored:
        return
    bits = next((bits for bits in ("4bit", "8bit") if stored.get(f"load_in_{bits}")), "")
    if not bits:
        raise ModelError(
            f"model {source} is quantised by {stored.get('quant_method', 'an unknown method')}, on which nothing is "
            "trained here; give the model that it was made of, with model.quantize = 4bit to save memory"
        )
    if bits != config.quantize:
        raise ModelError(f"model {source} is stored in {bits}; set model.quantize = {bits}")


def numbers(weight: Tensor) -> int:
    """The count of numbers that a weight stands for: two in every byte of a 4-bit one."""
    state = getattr(weight, "quant_state", None)
    return prod(state.shape) if state is not None else weight.numel()


def _without_packing(module: Any) -> None:
    module.support_avx512bf16_for_cpu = False


def _from_rows(module: Any) -> None:
    module.forward = partial(_linear, module)


def _linear(module: Any, x: Tensor) -> Tensor:
    product: Tensor = _Int8Product.apply(x, module)  # type: ignore[no-untyped-call]
    return product if module.bias is None else product + module.bias.to(x.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T with W made of its rows of whole numbers, and made anew in the backward pass: no whole W is held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return F.linear(x, _dense(module, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ _dense(ctx.module, grads[0].dtype), None


def _dense(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of an 8-bit layer, (d_out, d_in): each row is its whole numbers times its largest number over 127."""
    largest: Tensor = module.weight.SCB if module.state.SCB is None else module.state.SCB  # (d_out,)
    dense: Tensor = module.weight.float() * (largest.float() / 127).unsqueeze(1)
    return dense.to(dtype)


LAYERS: dict[str, Callable[[Any], None]] = {"Linear4bit": _without_packing, "Linear8bitLt": _from_rows}
