"""Small models that compute in float64 and without dropout, where two ways to one sum can be told from a mistake."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.models.model import Model


@contextmanager
def in_float64(model: Model) -> Iterator[Model]:
    """The model in float64 and without dropout within the block.

    The norms of transformers that compute in float32, whatever they are given, are replaced.
    """
    dtype, norms = model.dtype, [m for m in model.net.modules() if hasattr(m, "variance_epsilon")]
    model.net.double()
    model.dtype = "float64"
    for norm in norms:
        norm.forward = _rms_norm(norm)
    try:
        with without_dropout(model.net):
            yield model
    finally:
        for norm in norms:
            del norm.forward
        model.net.float()
        model.dtype = dtype


@contextmanager
def without_dropout(net: nn.Module) -> Iterator[None]:
    """No dropout within the block."""
    drops = {m: m.p for m in net.modules() if isinstance(m, nn.Dropout)}
    for drop in drops:
        drop.p = 0.0
    try:
        yield
    finally:
        for drop, p in drops.items():
            drop.p = p


def _rms_norm(module: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)

    return forward
