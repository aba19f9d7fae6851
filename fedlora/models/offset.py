"""The offset of a model: what is added to its pretrained weights beside the adapter that is trained."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.lora import LoRA, delta, join

from .adapter import NAME, Modules


class Offset:
    """What is added to the pretrained weights, under the adapter: folded into them, or beside them as a branch."""

    def __init__(self, worn: Modules, scales: Mapping[str, float], folds: bool) -> None:
        self.folds = folds
        self._layers, self._scales = worn, scales
        self._parts: tuple[LoRA, ...] = ()
        self._pretrained: dict[str, Tensor] = {}
        self._beside: dict[str, LoRA] = {}

    def wear(self, parts: tuple[LoRA, ...]) -> None:
        """Wear these parts and no others; those that it wears already, as the same objects, cost nothing."""
        if len(parts) == len(self._parts) and all(x is y for x, y in zip(parts, self._parts, strict=True)):
            return
        low = join(*[LoRA(part.A, part.B, R=part.R) for part in parts])
        dense: dict[str, Tensor] = {}
        for part in parts:
            dense |= {m: dense[m] + d if m in dense else d for m, d in part.D.items()}
        for name, layer in self._layers.items():
            device = layer.lora_A[NAME].weight.device
            sides = {"A": low.A, "B": low.B, "D": dense}
            own = LoRA(**{s: {name: t[name].to(device, torch.float32)} for s, t in sides.items() if name in t})
            if self.folds:
                self._fold(name, layer, delta(own).get(name))
            else:
                if name not in self._beside:
                    layer.register_forward_hook(self._add(name))
                self._beside[name] = own
        self._parts = parts

    @torch.no_grad()
    def _fold(self, name: str, layer: Any, product: Tensor | None) -> None:
        """Set the weight to W + s times the product, (d_out, d_in), always from W, so that nothing accumulates."""
        weight = layer.get_base_layer().weight
        if name in self._pretrained:
            weight.copy_(self._pretrained[name])
        if product is not None:
            self._pretrained.setdefault(name, weight.detach().clone())
            weight.add_(product.T if layer.fan_in_fan_out else product, alpha=self._scales[name])

    def _add(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            own, x = self._beside[name], inputs[0].float()
            for a, b in zip(own.A.values(), own.B.values(), strict=True):
                output = output + (self._scales[name] * F.linear(F.linear(x, a), b)).to(output.dtype)
            for d in own.D.values():
                output = output + (self._scales[name] * F.linear(x, d)).to(output.dtype)
            return output

        return add
