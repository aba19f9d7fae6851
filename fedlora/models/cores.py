"""The core R between A and B as layers of the network: one matrix (r, r), or blocks on its diagonal with scales.

A block-diagonal core has h heads of k numbers, h k = r: head i multiplies numbers i k to (i + 1) k of the rank
dimension by its own block (k, k), and by its own scale where those are trained. Nothing of size (r, r) is made.
"""

import torch
from torch import Tensor, nn

from fedlora.errors import StrategyError


def times_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """R x for a core of blocks on the diagonal; x (..., h k), blocks (h, k, k)."""
    return torch.einsum("...hk,hlk->...hl", x.reshape(*x.shape[:-1], *blocks.shape[:2]), blocks).flatten(-2)


class BlockDiagonal(nn.Module):
    """A linear layer without a bias whose weight is block-diagonal."""

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(blocks)  # (h, k, k)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """The blocks times x, (..., h k)."""
        return times_blocks(x, self.weight)


class HeadScales(nn.Module):
    """A factor on each head's numbers, 1 at first."""

    def __init__(self, core: Tensor) -> None:
        """For this core: (h, k, k), or (r, r), which is one head."""
        super().__init__()
        self.weight = nn.Parameter(head_scales(core))  # (h,)

    def forward(self, x: Tensor) -> Tensor:
        """Every head of x, (..., h k), times its scale."""
        return (x.reshape(*x.shape[:-1], len(self.weight), -1) * self.weight[:, None]).flatten(-2)


def head_scales(core: Tensor) -> Tensor:
    """The scales of a core's heads as they begin, all 1: (h,)."""
    return torch.ones_like(core[:, 0, 0] if core.dim() == 3 else core[0, :1]).detach()


def core_layer(name: str, given: Tensor, a: Tensor) -> nn.Module:
    """A layer for the core of this module, of the type and on the device of its A (r, d_in).

    Raises `StrategyError` for a core that does not fit A's rank.
    """
    check_core(name, given, a)
    weight = given.to(a.device, a.dtype, copy=True)
    if weight.dim() == 3:
        return BlockDiagonal(weight)
    rank = len(weight)
    core = nn.Linear(rank, rank, bias=False, device="meta")  # elsewhere it would draw from the run's generator
    core.weight = nn.Parameter(weight)
    return core


def check_core(name: str, given: Tensor, a: Tensor) -> None:
    """Raise `StrategyError` where a core is none that stands beside this A (r, d_in)."""
    rank, shape = len(a), tuple(given.shape)
    blocks = (shape[0], rank // shape[0], rank // shape[0]) if shape and shape[0] and not rank % shape[0] else ()
    if shape not in ((rank, rank), blocks):
        raise StrategyError(
            f"R of {name}: got {shape}, with this A the model takes {(rank, rank)}, or (h, k, k) with h k = {rank}"
        )


def folded(core: Tensor, scales: Tensor) -> Tensor:
    """The core with every head's scale, (h,), in its block."""
    return core * scales.view(-1, *[1] * (core.dim() - 1))
