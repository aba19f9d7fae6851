"""The gradient of every single example, by three engines that agree: one pass, Opacus's hooks, one example at a time.

For LoRA one pass is enough. A factor's gradient of one example is G^T X, (r, d_in) or (d_out, r), from its inputs X
(tokens, d_in) and output gradients G (tokens, d_out): as many flops as the example's part of the ordinary gradient, and
few numbers to hold. Norms by ghost clipping would save nothing and cost a second backward pass (the figures are in
benchmarks/README.md).

`clip` and `add_up` know neither model nor client: an engine that trains several clients in one batch passes the
gradients of all its examples at once, and with them `owner`, the client of each.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.encoding.encoder import Encoder, Example
from fedlora.errors import PrivacyError
from fedlora.kernels.replaced import forward_of
from fedlora.lora import at_least_float32
from fedlora.models.cores import BlockDiagonal, times_blocks

Gradients = list[Tensor]  # one tensor a parameter, (examples, *shape), float32 or wider
GradientFn = Callable[[Sequence[Example]], Gradients]
Keep = Callable[[Tensor | None, Tensor | None], None]  # stores the gradients of a weight and a bias
REMEDY = "choose lora.kind = lora and other lora.targets, or dp.engine = one, which takes one example at a time"


class Learner(Protocol):
    """The part of a `Model` that an engine of single gradients uses."""

    @property
    def net(self) -> nn.Module:
        """The network, with its adapter attached."""
        ...

    @property
    def encoder(self) -> Encoder:
        """The encoder, which makes batches of examples."""
        ...

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of every example in a batch, (examples,)."""
        ...


class LossMeter:
    """A model as an engine of single gradients uses it, which keeps the losses of the examples that pass."""

    def __init__(self, model: Learner) -> None:
        self._model = model
        self._losses: list[Tensor] = []

    @property
    def net(self) -> nn.Module:
        """The network, with its adapter attached."""
        return self._model.net

    @property
    def encoder(self) -> Encoder:
        """The encoder, which makes batches of examples."""
        return self._model.encoder

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of every example in a batch, (examples,), and keep it."""
        losses = self._model.losses(batch)
        self._losses.append(losses.detach())
        return losses

    def kept(self) -> list[float]:
        """The losses of all examples that have passed."""
        return torch.cat(self._losses).tolist() if self._losses else []


class PerExample(Protocol):
    """An engine of single gradients: a context in which calling it with examples returns their gradients.

    After the block the model is as it was before, and its parameters have no `.grad`.
    """

    def __init__(self, model: Learner, parameters: Sequence[nn.Parameter]) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def __call__(self, examples: Sequence[Example]) -> Gradients: ...


class OnePassGradients:
    """One forward and one backward pass, in which the layers with trained parameters store each example's gradient.

    An example may have several rows in a batch, as a preference has two: their gradients are added up.

    Raises `PrivacyError`, naming the module, where one example's gradient cannot be told from another's.
    """

    def __init__(self, model: Learner, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters
        self._found: dict[int, Tensor] = {}
        self._n, self._rows = 0, 1

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # if a layer is refused, those before it get their own forward back
            for name, module in _holders(self._model.net, LAYERS, "one pass"):
                forward = partial(LAYERS[type(module)], module, partial(self._check, name), partial(self._keep, module))
                stack.enter_context(forward_of(module, forward))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._found = {}
        _forget(self._parameters)

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        batch, self._found = self._model.encoder.collate(examples), {}
        self._n, self._rows = len(examples), len(batch["labels"]) // len(examples)
        _backward(self._model, batch)
        for p in self._parameters:
            if p.grad is not None:
                raise PrivacyError(f"{_name(self._model, p)} is used outside the layer that holds it; {REMEDY}")
            if id(p) not in self._found:
                raise PrivacyError(f"{_name(self._model, p)} got no gradient of single examples; {REMEDY}")
        return [self._found.pop(id(p)) for p in self._parameters]

    def _check(self, name: str, x: Tensor) -> None:
        if x.shape[0] != self._n * self._rows:
            raise PrivacyError(
                f"{name} sees {x.shape[0]} rows where there are {self._n} examples: its tokens lie in one heap, and "
                f"cannot be clipped by example; {REMEDY}"
            )

    def _keep(self, module: Any, weight: Tensor | None, bias: Tensor | None) -> None:
        for p, share in ((module.weight, weight), (module.bias, bias)):
            if share is not None:
                # the rows of one example lie as far apart as there are examples: all first rows, then all second ones
                own = share if self._rows == 1 else share.view(self._rows, self._n, *share.shape[1:]).sum(0)
                before = self._found.get(id(p))  # a layer that is used twice
                self._found[id(p)] = at_least_float32(own) if before is None else before + own


class OpacusGradients:
    """Opacus's hooks: a reference, and the engine for layers that `OnePass` does not know."""

    def __init__(self, model: Learner, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters

    def __enter__(self) -> Self:
        from opacus.grad_sample import GradSampleHooks  # here, as the import takes a second

        # Opacus would try other layers by functorch: it fails on some with an error of its own, and overlooks some
        list(_holders(self._model.net, GradSampleHooks.GRAD_SAMPLERS, "Opacus"))
        made: Any = GradSampleHooks  # untyped
        self._hooks = made(self._model.net, loss_reduction="sum", strict=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.cleanup()
        for module in self._model.net.modules():
            for left in ("activations", "max_batch_len"):  # which a pass that was interrupted leaves behind
                module.__dict__.pop(left, None)
        _forget(self._parameters)

    def __call__(self, examples: Sequence[Example]) -> Gradients:
        _backward(self._model, self._model.encoder.collate(examples))
        found: Gradients = []
        for p in self._parameters:
            g = getattr(p, "grad_sample", None)
            if not isinstance(g, Tensor) or g.shape[0] != len(examples):
                raise PrivacyError(
                    f"Opacus's hooks find no gradient of single examples for {_name(self._model, p)}; {REMEDY}"
                )
            found.append(at_least_float32(g))
            p.grad_sample = None  # type: ignore[attr-defined]
        _forget(self._parameters)
        return found


class LoopedGradients:
    """Autograd on one example after another: slow, right for any module, and the reference for the other engines."""

    def __init__(self, model: Learner, parameters: Sequence[nn.Parameter]) -> None:
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
        return [torch.stack([at_least_float32(g) for g in column]) for column in zip(*rows, strict=True)]


ENGINES: dict[str, type[PerExample]] = {"lora": OnePassGradients, "hooks": OpacusGradients, "one": LoopedGradients}


def clip(gradients: Gradients, groups: Sequence[int], bounds: Sequence[float]) -> list[Tensor]:
    """Return a factor for each parameter and example, (examples,), with which no example's norm exceeds its bound.

    Parameter j is in group groups[j], and the gradients of a group together have norm bounds[group] at most. An example
    with a gradient that is not finite gets the factor zero; its gradients are set to zero in place, as zero times NaN
    is NaN.
    """
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    finite = torch.isfinite(torch.stack(norms).sum(0))
    if not bool(finite.all()):
        for g in gradients:
            g[~finite] = 0.0

    def factor(group: int) -> Tensor:
        own = torch.stack([norm for norm, k in zip(norms, groups, strict=True) if k == group])
        bound = bounds[group]
        return torch.where(finite, bound / torch.linalg.vector_norm(own, dim=0).clamp(min=bound), 0.0)

    factors = {group: factor(group) for group in set(groups)}
    return [factors[group] for group in groups]


def add_up(gradients: Gradients, factors: Sequence[Tensor], owner: Tensor | None = None, owners: int = 1) -> Gradients:
    """Return for each parameter the sums of factor times gradient by owner, (owners, *shape).

    Example i belongs to owner[i]; without `owner` all belong to one.
    """
    owner = torch.zeros(len(gradients[0]), dtype=torch.int64) if owner is None else owner
    belongs = F.one_hot(owner.to(gradients[0].device), owners).T  # (owners, examples)
    return [((belongs * c) @ g.flatten(1)).view(owners, *g.shape[1:]) for g, c in zip(gradients, factors, strict=True)]


def _holders(net: nn.Module, known: Container[type[nn.Module]], who: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers with trained parameters. Raises `PrivacyError` at a layer that is not of a known kind."""
    for name, module in net.named_modules():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if type(module) not in known:
            raise PrivacyError(
                f"{name} is a {type(module).__name__}, of which {who} cannot tell one example's gradient from "
                f"another's; {REMEDY}"
            )
        yield name, module


def _name(model: Learner, parameter: nn.Parameter) -> str:
    return next(name for name, p in model.net.named_parameters() if p is parameter)


def _forget(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


def _backward(model: Learner, batch: dict[str, Tensor]) -> None:
    loss: Tensor = model.losses(batch).sum()
    loss.backward()  # type: ignore[no-untyped-call]


def _linear(module: nn.Module, check: Callable[[Tensor], None], keep: Keep, x: Tensor) -> Tensor:
    check(x)
    out: Tensor = _Linear.apply(x, module.weight, module.bias, keep)  # type: ignore[no-untyped-call]
    return out


def _layer_norm(module: Any, check: Callable[[Tensor], None], keep: Keep, x: Tensor) -> Tensor:
    check(x)
    normed = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    out: Tensor = _Affine.apply(normed, module.weight, module.bias, keep)  # type: ignore[no-untyped-call]
    return out


def _block_diagonal(module: nn.Module, check: Callable[[Tensor], None], keep: Keep, x: Tensor) -> Tensor:
    check(x)
    out: Tensor = _BlockDiagonal.apply(x, module.weight, keep)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """A linear layer that passes each example's G^T X to `keep`, and gives its parameters no gradient of the batch.

    It does so within the backward pass, so that X and G are freed at once: held until the end of the pass they would
    take three times the memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep) -> Tensor:
        ctx.keep = keep
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        n = x.shape[0]
        gs, xs = g.reshape(n, -1, g.shape[-1]), x.reshape(n, -1, x.shape[-1])  # (n, tokens, d)
        wanted, weighs, biases, _ = ctx.needs_input_grad
        ctx.keep(_products(gs, xs) if weighs else None, gs.sum(1) if biases else None)
        return g @ weight if wanted else None, None, None, None


def _products(gs: Tensor, xs: Tensor) -> Tensor:
    """Return G^T X of each example, (n, d_out, d_in); BLAS makes few rows four times as fast as few columns."""
    if gs.shape[2] <= xs.shape[2]:
        return torch.bmm(gs.transpose(1, 2), xs)
    return torch.bmm(xs.transpose(1, 2), gs).transpose(1, 2).contiguous()


class _Affine(torch.autograd.Function):
    """The scale and shift at the end of a layer norm, with each example's gradients passed to `keep` likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: Keep) -> Tensor:
        ctx.keep = keep
        ctx.save_for_backward(x, weight)
        return x * weight if bias is None else x * weight + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight) = grads, ctx.saved_tensors
        wanted, weighs, biases, _ = ctx.needs_input_grad
        gs, xs = (t.reshape(len(t), -1, *weight.shape) for t in (g, x))  # (n, tokens, *shape)
        ctx.keep((gs * xs).sum(1) if weighs else None, gs.sum(1) if biases else None)
        return g * weight if wanted else None, None, None, None


class _BlockDiagonal(torch.autograd.Function):
    """A core in blocks on its diagonal, with each example's gradient passed to `keep` likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, keep: Keep) -> Tensor:
        ctx.keep = keep
        ctx.save_for_backward(x, blocks)
        return times_blocks(x, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, blocks) = grads, ctx.saved_tensors
        gs, xs = (t.reshape(len(t), -1, *blocks.shape[:2]) for t in (g, x))  # (n, tokens, h, k)
        ctx.keep(torch.einsum("nthl,nthk->nhlk", gs, xs), None)
        return times_blocks(g, blocks.transpose(1, 2)) if ctx.needs_input_grad[0] else None, None, None


LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    BlockDiagonal: _block_diagonal,
}
