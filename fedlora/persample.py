"""The gradient of every example by itself, three ways that agree: one pass, Opacus's hooks, one example at a time.

For LoRA one pass is enough. A factor's gradient of one example is G^T X, (r, d_in) or (d_out, r) from X (tokens, d_in)
and G (tokens, d_out): as many flops as its share of the ordinary gradient, and few numbers to hold. Norms by ghost
clipping would save nothing and cost a second backward pass (benchmarks/privacy.md has the figures).

`clip` and `add_up` know neither model nor client: an engine that trains several clients in one batch gives them all
its examples' gradients at once, and `owner`, the client of each.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from .encode import Example
from .errors import PrivacyError
from .lora import wide
from .model import Model

Gradients = list[Tensor]  # of each parameter, (examples, *shape), float32 or wider
Keep = Callable[[Tensor | None, Tensor | None], None]  # of a weight and a bias
REMEDY = "choose other lora.targets, or dp.engine = one, which takes one example at a time"


class PerExample(Protocol):
    """A model made ready; it is as it was again when the block is left."""

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def __call__(self, examples: Sequence[Example]) -> Gradients: ...


class OnePass:
    """One forward and one backward pass; the layers that hold what is trained keep each example's share.

    Raises `PrivacyError`, naming the module, where an example's share cannot be told.
    """

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters
        self._names = {id(p): name for name, p in model.net.named_parameters()}
        self._stack = ExitStack()
        self._found: dict[int, Tensor] = {}
        self._n = 0

    def __enter__(self) -> Self:
        for name, module in self._model.net.named_modules():
            own = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
            if own and type(module) not in LAYERS:
                raise PrivacyError(
                    f"{name} is a {type(module).__name__}, of which one pass cannot tell one example's gradient from "
                    f"another's; {REMEDY}"
                )
            if own:
                forward = partial(LAYERS[type(module)], module, partial(self._check, name), partial(self._keep, own))
                self._stack.enter_context(_forward(module, forward))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        self._n, self._found = len(examples), {}
        _backward(self._model, examples)
        for p in self._parameters:
            if p.grad is not None:
                p.grad = None
                raise PrivacyError(f"{self._names[id(p)]} is used outside the layer that holds it; {REMEDY}")
            if id(p) not in self._found:
                raise PrivacyError(f"{self._names[id(p)]} got no gradient of single examples; {REMEDY}")
        return [self._found.pop(id(p)) for p in self._parameters]

    def _check(self, name: str, x: Tensor) -> None:
        if x.shape[0] != self._n:
            raise PrivacyError(
                f"{name} sees {x.shape[0]} rows where there are {self._n} examples: its tokens lie in one heap, and "
                f"cannot be clipped by example; {REMEDY}"
            )

    def _keep(self, own: dict[str, nn.Parameter], weight: Tensor | None, bias: Tensor | None) -> None:
        for key, share in (("weight", weight), ("bias", bias)):
            if key in own and share is not None:
                before = self._found.get(id(own[key]))  # a layer that is used twice
                self._found[id(own[key])] = wide(share) if before is None else before + share


class Hooks:
    """Opacus's hooks: the reference, and for layers that `OnePass` does not know."""

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters

    def __enter__(self) -> Self:
        made: Any = GradSampleHooks  # untyped
        self._hooks = made(self._model.net, loss_reduction="sum", strict=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.cleanup()

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        for p in self._parameters:
            p.grad_sample = None  # type: ignore[attr-defined]
        _backward(self._model, examples)
        found = [getattr(p, "grad_sample", None) for p in self._parameters]
        for p, g in zip(self._parameters, found, strict=True):
            p.grad = None
            if not isinstance(g, Tensor) or g.shape[0] != len(examples):
                name = next(n for n, q in self._model.net.named_parameters() if q is p)
                raise PrivacyError(f"Opacus's hooks find no gradient of single examples for {name}; {REMEDY}")
        return [wide(g) for g in found if isinstance(g, Tensor)]


class OneByOne:
    """By autograd, one example after another: slow, right for any module, and what the others answer to."""

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        rows = []
        for example in examples:
            loss = self._model.losses(self._model.encoder.collate([example])).sum()
            rows.append(torch.autograd.grad(loss, self._parameters, materialize_grads=True))
        return [torch.stack([wide(g) for g in of_one]) for of_one in zip(*rows, strict=True)]


ENGINES: dict[str, type[PerExample]] = {"lora": OnePass, "hooks": Hooks, "one": OneByOne}


def clip(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
    """The factor (examples,) on each parameter's gradients that makes no example longer than its group's bound.

    Parameter j is in group groups[j]. An example with a gradient that is not finite counts as nothing, and is made so
    in place, as zero times what is not a number is none.
    """
    squares = [g.flatten(1).square().sum(1) for g in gradients]
    finite = torch.isfinite(torch.stack(squares).sum(0))
    if not bool(finite.all()):
        for g in gradients:
            g[~finite] = 0.0

    def factor(group: int, bound: float) -> Tensor:
        own = torch.stack([s for s, k in zip(squares, groups, strict=True) if k == group])
        return torch.where(finite, bound / own.sum(0).sqrt().clamp(min=bound), 0.0)

    factors = {i: factor(i, bounds[i]) for i in set(groups)}
    return [factors[k] for k in groups]


def add_up(gradients: Gradients, factors: Sequence[Tensor], owner: Tensor | None = None, owners: int = 1) -> Gradients:
    """Of each parameter the sum of factor times gradient by owner, (owners, *shape): example i belongs to owner[i]."""
    owner = torch.zeros(len(gradients[0]), dtype=torch.int64) if owner is None else owner
    belongs = F.one_hot(owner.to(gradients[0].device), owners).T  # (owners, examples)
    return [((belongs * c) @ g.flatten(1)).view(owners, *g.shape[1:]) for g, c in zip(gradients, factors, strict=True)]


def _backward(model: Model, examples: Sequence[Example]) -> None:
    loss: Tensor = model.losses(model.encoder.collate(examples)).sum()
    loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _forward(module: nn.Module, forward: Any) -> Any:
    """Another forward for this one module, whatever it had."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _linear(module: nn.Module, check: Callable[[Tensor], None], keep: Keep, x: Tensor) -> Tensor:
    check(x)
    out: Tensor = _Linear.apply(x, module.weight, module.bias, keep)  # type: ignore[no-untyped-call]
    return out


def _layer_norm(module: Any, check: Callable[[Tensor], None], keep: Keep, x: Tensor) -> Tensor:
    check(x)
    normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    out: Tensor = _Affine.apply(normed, module.weight, module.bias, keep)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """A linear layer that hands G^T X of each example over, and gives its parameters no gradient of the batch.

    It does so within the backward pass, so that X and G are freed at once: kept until its end they would take three
    times the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep) -> Tensor:
        ctx.keep, ctx.biased = keep, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        n = x.shape[0]
        gs, xs = g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1])  # (n, tokens, d)
        ctx.keep(torch.bmm(gs.transpose(1, 2), xs), gs.sum(1) if ctx.biased else None)
        return g @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Affine(torch.autograd.Function):
    """The scale and shift at the end of a layer norm, likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep) -> Tensor:
        ctx.keep = keep
        ctx.save_for_backward(x, weight)
        return x * weight if bias is None else x * weight + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        between = tuple(range(1, g.dim() - weight.dim()))  # the tokens
        ctx.keep((g * x).sum(between) if between else g * x, g.sum(between) if between else g)
        return g * weight if ctx.needs_input_grad[0] else None, None, None, None


LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: _linear, nn.LayerNorm: _layer_norm}
