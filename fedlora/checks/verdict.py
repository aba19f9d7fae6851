"""The outcome of a check: None if all is well, a `Skip` where it has no meaning, else a `ContractBroken` with numbers.

The error is raised by functions and not by `assert`, which `python -O` leaves out: a contract that is not checked would
look as if it were kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlora.lora import Side
from fedlora.storage import checkpoint
from fedlora.strategy import Strategy

CLOSE = 1e-5  # relative, of a matrix: far above the rounding of float32, far below what a wrong rule leaves
TINY = 1e-5  # the size below which a matrix counts as zero


class ContractBroken(AssertionError):
    """A check that fails: what does not hold, with numbers, and what is most likely to be done about it."""

    def __init__(self, claim: str, remedy: str = "") -> None:
        super().__init__(f"{claim}; {remedy}" if remedy else claim)
        self.remedy = remedy


@dataclass(frozen=True)
class Skip:
    """Why a check has no meaning for a strategy."""

    reason: str


@dataclass(frozen=True)
class Distance:
    """Where two sets of matrices differ most."""

    place: str
    gap: float  # Frobenius norm of the difference
    size: float  # Frobenius norm of what was wanted

    @property
    def relative(self) -> float:
        """The gap over the size; over `TINY` where that is larger."""
        return self.gap / max(self.size, TINY)

    @property
    def near(self) -> bool:
        """Is the gap no more than rounding?"""
        return self.relative <= CLOSE

    def or_worse(self, other: "Distance") -> "Distance":
        """The larger of the two distances."""
        return other if other.relative > self.relative else self

    def __str__(self) -> str:
        return f"by {self.gap:.2g} of {self.size:.3g} at {self.place}"


NOWHERE = Distance("any module", 0.0, 0.0)


def apart(got: Side, want: Side) -> Distance:
    """How far `got` is from `want` where it is farthest; a matrix missing or of another shape is infinitely far."""
    return max((_gap(m, got.get(m), t) for m, t in want.items()), key=lambda d: d.relative, default=NOWHERE)


def differing(got: Side, want: Side) -> list[str]:
    """The names of the matrices that differ by more than rounding."""
    return [m for m, t in want.items() if not _gap(m, got.get(m), t).near]


def require(holds: bool, claim: str, remedy: str = "") -> None:
    """Raise `ContractBroken` with the claim, and what is most likely to be done, where something does not hold."""
    if not holds:
        raise ContractBroken(claim, remedy)


def agree(
    strategy: Strategy[Any], claim: str, got: Side, want: Side, close: float = CLOSE, *, remedy: str = ""
) -> None:
    """Raise `ContractBroken` where the matrices differ by more than rounding; `claim` says what that means."""
    distance = apart(got, want)
    require(distance.relative <= close, f"{strategy}: {claim}: off {distance}", remedy)


def declared(strategy: Strategy[Any], name: str, happened: bool, evidence: str) -> None:
    """Raise `ContractBroken` where a declaration is not what happened, in either direction."""
    said = bool(getattr(strategy, name))
    says = "declares" if said else "does not declare"
    modest = hasattr(strategy, "inner") and not said  # a wrapper may promise less than holds round some strategy
    where = f"in class {type(strategy).__name__}"
    remedy = f"take {name} = True back {where}, or mend its mathematics" if said else f"declare {name} = True {where}"
    require(said == happened or modest, f"{strategy} {says} {name}, and {evidence}", remedy)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a state, in a fixed order."""
    return list(checkpoint.pack(tree)[0].values())


def identical(one: Any, other: Any) -> bool:
    """Are two trees the same: structure, plain values, and tensors to the bit?"""
    (these, tree), (those, its) = checkpoint.pack(one), checkpoint.pack(other)
    return tree == its and all(_identical(t, those[name]) for name, t in these.items())


def _identical(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x, y)


def _gap(place: str, got: Tensor | None, want: Tensor) -> Distance:
    size = float(want.double().norm())
    if got is None or got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return Distance(place, float("inf"), size)
    return Distance(place, float((got.double() - want.double()).norm()), size)
