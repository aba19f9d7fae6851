"""Uploads such as fifty clients might send: factors of q and v of Llama-2-7B, with the spectra that training leaves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

D = 4096  # rows and columns of q and v; 32 layers have 64 of them


@dataclass(frozen=True)
class Module:
    """One module's uploads, with weights p that sum to one."""

    p: list[float]
    start: Tensor  # (r, d), the A that all clients started from
    A: list[Tensor]  # (r, d)
    B: list[Tensor]  # (d, r)

    def double(self) -> "Module":
        """The same in float64."""
        return Module(self.p, self.start.double(), [a.double() for a in self.A], [b.double() for b in self.B])


Draw = Callable[[torch.Generator, list[float], int], Module]


def trained(g: torch.Generator, p: list[float], r: int) -> Module:
    """A common start, and drifts along 256 shared directions, the i-th of strength 1/sqrt(i).

    Slope and sizes are those of MiniLM's first query matrix in a fourth round on SST-2 (24 clients, r = 16, ten steps
    of AdamW): |dA| = 0.25 |A|, |dB| = 1.1 |B|. In later layers singular values fall faster, which is easier.
    """
    strength = torch.arange(1, 257.0) ** -0.5
    U, V = torch.randn(D, 256, generator=g) * strength, strength[:, None] * torch.randn(256, D, generator=g)

    def of_a() -> Tensor:
        return torch.randn(r, 256, generator=g) @ V

    def of_b() -> Tensor:
        return U @ torch.randn(256, r, generator=g)

    return _drifted(g, p, of_a, of_b)


def scattered(g: torch.Generator, p: list[float], r: int) -> Module:
    """The same start and sizes, but drifts of noise, that have no direction in common: the residual is flat."""
    return _drifted(g, p, lambda: torch.randn(r, D, generator=g), lambda: torch.randn(D, r, generator=g))


def iid(g: torch.Generator, p: list[float], r: int) -> Module:
    """Nothing in common: every factor is noise, and the mean of the products is flat too."""
    A, B = ([torch.randn(*shape, generator=g) / D**0.5 for _ in p] for shape in ((r, D), (D, r)))
    return Module(p, A[0], A, B)


def _drifted(g: torch.Generator, p: list[float], of_a: Callable[[], Tensor], of_b: Callable[[], Tensor]) -> Module:
    """A as PEFT draws it, a small B, and for every client a drift of each."""
    B0 = of_b()
    r = B0.shape[1]
    A0, B0 = (torch.rand(r, D, generator=g) * 2 - 1) / D**0.5, 0.1 * B0 / B0.norm()
    A = [A0 + 0.25 * A0.norm() * a / a.norm() for a in (of_a() for _ in p)]
    B = [B0 + 1.1 * B0.norm() * b / b.norm() for b in (of_b() for _ in p)]
    return Module(p, A0, A, B)


KINDS: dict[str, Draw] = {"trained": trained, "scattered": scattered, "iid": iid}
