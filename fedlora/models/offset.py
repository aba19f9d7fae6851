"""The offset of a model: what is added to its pretrained weights beside the adapter that is trained."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.lora import LoRA, delta, join

from .adapted_modules import Modules
from .adapter import NAME


class Offset:
    """The matrices that are added to the pretrained weights: folded into them, or computed beside them.

    A weight in half precision, or a quantised one, would round small residuals away; there the offset is a branch. So
    it is where another module has the same weight, as the input embedding has that of a tied output layer: what is
    folded into one would be in the other too.
    """

    def __init__(self, layers: Modules, scales: Mapping[str, float], folds: bool, tied: Collection[str] = ()) -> None:
        """`tied` are the modules whose weight is another module's too."""
        self.folds = folds
        self._tied = frozenset(tied)
        self._layers, self._scales = layers, scales
        self.parts: tuple[LoRA, ...] = ()
        self._pretrained: dict[str, Tensor] = {}
        self._beside: dict[str, LoRA] = {}

    def set(self, parts: tuple[LoRA, ...]) -> None:
        """Replace the offset by the sum of these parts; the same objects as last time cost nothing."""
        if list(map(id, parts)) == list(map(id, self.parts)):
            return
        low_rank = join(*[part.only("ABR") for part in parts])
        whole = LoRA(low_rank.A, low_rank.B, D=_sum_of_dense(parts))
        for name, layer in self._layers.items():
            own = _of_module(whole, name, layer.lora_A[NAME].weight.device)
            if self.folds and name not in self._tied:
                self._fold(name, layer, delta(own).get(name))
            else:
                self._put_beside(name, layer, own)
        self.parts = parts

    def _put_beside(self, name: str, layer: Any, own: LoRA) -> None:
        if name not in self._beside:
            layer.register_forward_hook(self._add(name))
        self._beside[name] = own

    @torch.no_grad()
    def _fold(self, name: str, layer: Any, product: Tensor | None) -> None:
        """Set the weight to W + s times the product (d_out, d_in), from a copy of W, so that no errors accumulate."""
        weight = layer.get_base_layer().weight
        if name in self._pretrained:
            weight.copy_(self._pretrained[name])
        if product is not None:
            self._pretrained.setdefault(name, weight.detach().clone())
            weight.add_(product.T if layer.fan_in_fan_out else product, alpha=self._scales[name])

    def _add(self, name: str) -> Any:
        """A hook that adds what stands beside this module to its output."""

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            own, x = self._beside[name], inputs[0].float()
            for a, b in zip(own.A.values(), own.B.values(), strict=True):
                output = output + (self._scales[name] * F.linear(F.linear(x, a), b)).to(output.dtype)
            for d in own.D.values():
                output = output + (self._scales[name] * F.linear(x, d)).to(output.dtype)
            return output

        return add


def _sum_of_dense(parts: Iterable[LoRA]) -> dict[str, Tensor]:
    """The dense matrices of all parts, added up by modules: (d_out, d_in) each."""
    total: dict[str, Tensor] = {}
    for part in parts:
        total |= {m: total[m] + d if m in total else d for m, d in part.D.items()}
    return total


def _of_module(offset: LoRA, name: str, device: torch.device) -> LoRA:
    """One module's factors and dense matrix, those that there are, in float32 on a device."""
    sides = {s: offset.side(s) for s in "ABD"}
    return LoRA(**{s: {name: t[name].to(device, torch.float32)} for s, t in sides.items() if name in t})
