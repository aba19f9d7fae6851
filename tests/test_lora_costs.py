"""What the algebra on factors must not cost: digits, and memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlora.lora import (
    LoRA,
    average,
    compact,
    delta,
    densify,
    inner,
    join,
    norm,
    orthonormal,
    principal,
    residual,
    scale,
    stack,
    truncate,
)
from tests.support.adapters import factors


def rounded(x: LoRA, dtype: torch.dtype) -> LoRA:
    return LoRA(**{s: {m: t.to(dtype) for m, t in x.side(s).items()} for s in "ABRDH"})


def test_the_residual_keeps_its_digits_when_clients_hardly_differ() -> None:
    base = factors(0)
    near = [
        LoRA(
            {m: a + 1e-4 * factors(i).A[m] for m, a in base.A.items()},
            {m: b + 1e-4 * factors(i).B[m] for m, b in base.B.items()},
        )
        for i in (1, 2, 3)
    ]
    exact = delta(residual(near, [1, 1, 1]))
    for m, d in delta(residual([rounded(x, torch.float32) for x in near], [1, 1, 1])).items():
        assert (d - exact[m]).norm() < 0.02 * exact[m].norm()  # the difference of two products would be all noise


def test_norm_sees_a_difference_below_single_precision() -> None:
    x = rounded(factors(1), torch.float32)
    moved = LoRA(x.A, {m: b * (1 + 2**-20) for m, b in x.B.items()})
    assert norm(join(moved, scale(x, -1))) == pytest.approx(2**-20 * norm(x), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    loras = [factors(i, dtype=dtype) for i in range(8)]
    mean = average(loras, [1.0] * 8).A["q"]
    assert mean.dtype == torch.float32
    assert_close(mean, torch.stack([x.A["q"].float() for x in loras]).mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    loras = [factors(i, dtype=dtype) for i in range(3)]
    exact = [rounded(x, torch.float64) for x in loras]
    for work in (stack, residual, lambda x, w: truncate(stack(x, w), 3), lambda x, w: orthonormal(average(x, w))):
        got = work(loras, [1, 2, 3])
        assert all(t.dtype == torch.float32 for t in (*got.A.values(), *got.B.values()))
        assert norm(join(got, scale(work(exact, [1, 2, 3]), -1))) < 1e-5 * norm(stack(loras, [1, 2, 3]))


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the bytes of the largest tensor made, and those that all held together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        held = self.held()
        self.largest, self.peak = max(self.largest, *held, 0), max(self.peak, sum(held))
        return out

    def held(self) -> list[int]:
        """The bytes of every store that is still there; a view shares its store."""
        stores = [t.untyped_storage() for t in (ref() for ref in self._made) if t is not None]
        return list({s.data_ptr(): s.nbytes() for s in stores}.values())


def drawn(clients: int, d: int, rank: int, modules: int) -> list[LoRA]:
    g = torch.Generator().manual_seed(0)
    names = [f"layer.{i}" for i in range(modules)]
    return [
        LoRA(
            {m: torch.randn(rank, d, generator=g) for m in names},
            {m: torch.randn(d, rank, generator=g) for m in names},
        )
        for _ in range(clients)
    ]


def test_nothing_as_large_as_a_dense_matrix_is_made() -> None:
    K, d, r = 20, 300, 2
    loras, weights = drawn(K, d, r, 1), [1.0] * K
    with Made() as made:
        mean, rest = stack(loras, weights), residual(loras, weights)
        average(loras, weights)
        for x in (mean, rest):
            truncate(x, r), truncate(x, K), principal(x, r), norm(x), inner(x, mean), compact(x)
        densify((rest, orthonormal(loras[0])))
    assert 4 * K * r * d <= made.largest < 4 * d * d / 2  # `norm` has one factor in float64


WHOLE: dict[str, Callable[[list[LoRA], LoRA], Any]] = {
    "average": lambda loras, _: average(loras, [1.0] * len(loras)),
    "stack": lambda loras, _: stack(loras, [1.0] * len(loras)),
    "residual": lambda loras, _: residual(loras, [1.0] * len(loras)),
    "join": lambda loras, _: join(*loras),
    "truncate": lambda _, joined: truncate(joined, 2),
    "principal": lambda _, joined: principal(joined, 2),
    "norm": lambda _, joined: norm(joined),
    "inner": lambda _, joined: inner(joined, joined),
    "densify": lambda loras, _: densify((*loras, *loras, *loras, *loras)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_work_beside_the_result_is_on_one_module_at_a_time(name: str) -> None:
    """Sixteen modules more take no more than their own results."""
    beside = []
    for modules in (4, 20):
        loras = drawn(10, 100, 2, modules)
        joined = join(*loras)
        with Made() as made:
            result = WHOLE[name](loras, joined)  # held, so that it counts
        beside.append(made.peak - sum(made.held()))
        assert result
    assert beside[1] <= beside[0] + 1024
