"""A model whose every row is computed with the adapter of its own client, in one forward and one backward pass.

The PEFT model stays as it is: within the context its adapted layers, and the layers of its heads, have another
`forward`, which reads the matrices of the rows from columns of theta (rows, P) and writes their gradients into the same
columns of G (rows, P_t). The base is frozen and shared. All else is the network's own, with the quicker dropout,
attention, norms and losses of `fedlora.kernels`, and in BERT's last layer the first token alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.client.stacked.layout import Key, Layout
from fedlora.client.stacked.row_layers import Factors, Scale, add_product, linear_with_product, row_affine, row_linear
from fedlora.encoding.encoder import Example
from fedlora.kernels.attention import quick_attention
from fedlora.kernels.dropout import quick_dropout
from fedlora.kernels.first_token import first_token_alone
from fedlora.kernels.losses import example_losses
from fedlora.kernels.norms import quick_norms
from fedlora.kernels.replaced import forward_of
from fedlora.models.adapter import NAME
from fedlora.models.model import Model

HEAD_LAYERS = nn.Linear, nn.LayerNorm


class NotStackableError(Exception):
    """The rows of a batch cannot be computed each with its own adapter; the text is a sentence that names the module.

    Whoever meets it trains the clients one after another instead.
    """


class RowPass:
    """A context in which a model computes every row with its own client's columns of theta."""

    def __init__(self, model: Model, layout: Layout, gains: Sequence[Mapping[str, float]] = ()) -> None:
        """`gains` are those of each client's job, on the s of a module; without any they are all 1."""
        self._model, self._layout = model, layout
        like = torch.zeros((), dtype=model.adapter_dtype, device=model.device)
        self._scales = {name: _scale(s, name, gains, like) for name, s in model.scales.items()}
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._rows = torch.empty(0)
        self._gradient = torch.empty(0)
        self._owner = torch.empty(0, dtype=torch.int64)
        self._written: set[Key] = set()
        self.sides = "ABRH"  # of which gradients are found, of those that are trained; others' are zero
        self.reached: set[Key] = set()  # that had a gradient in any batch so far
        self._is_told_apart = False  # has a batch shown that every adapted layer sees rows first?

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what was replaced before a refusal gets its own forward back
            stack.enter_context(quick_dropout(self._model.net))
            stack.enter_context(quick_attention(self._model.net))
            stack.enter_context(quick_norms(self._model.net))
            stack.enter_context(first_token_alone(self._model.net))
            for name, layer in self._model.adapted.items():
                stack.enter_context(forward_of(layer, partial(self._adapted, name, layer)))
            for name, module in head_layers(self._model):
                stack.enter_context(forward_of(module, partial(self._head, name, module)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def assign(self, theta: Tensor, owner: Tensor) -> None:
        """Let the next batch be of these clients: theta (clients, P), and of each example the place of its client."""
        self._owner = owner.repeat(self._model.objective.rows)
        self._rows = theta.index_select(0, self._owner)

    @torch.no_grad()
    def check(self, theta: Tensor, example: Example) -> None:
        """Run one example alone; raises `NotStackableError` where a layer does not see rows first.

        A batch of as many rows as tokens would not tell.
        """
        self.assign(theta, torch.zeros(1, dtype=torch.int64, device=theta.device))
        self._model.outputs(self._model.encoder.collate([example]))

    def gradients(
        self, theta: Tensor, owner: Tensor, weights: Tensor, examples: Sequence[Example]
    ) -> tuple[Tensor, Tensor]:
        """The gradient of weight times loss of every example, (examples, P_t), and the losses, (examples,).

        A loss is the sum over the targets of its example. Raises `NotStackableError`.
        """
        batch = self._model.encoder.collate(examples)
        if len(examples) > 1 and not self._is_told_apart and _could_be_transposed(batch):
            halves = slice(1), slice(1, None)
            parts = [self.gradients(theta, owner[own], weights[own], examples[own]) for own in halves]
            return torch.cat([g for g, _ in parts]), torch.cat([losses for _, losses in parts])
        self.assign(theta, owner)
        self._gradient = torch.empty_like(self._rows[:, : self._layout.trained])
        self._written = set()
        losses = example_losses(self._model, batch)
        (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
        self._is_told_apart = True
        self.reached |= self._written
        self._zero_unwritten()
        # the rows of one example lie as far apart as there are examples: all first rows, then all second ones
        by_row, self._gradient = self._gradient, torch.empty(0)
        rows = self._model.objective.rows
        gradient = by_row if rows == 1 else by_row.view(rows, len(examples), -1).sum(0)
        return gradient, losses.detach()

    def _zero_unwritten(self) -> None:
        """Give what no layer of this batch has used a gradient of zero."""
        for key in self._layout.columns:
            if self._layout.is_trained(key) and key not in self._written:
                self._layout.view(self._gradient, key).zero_()

    def _adapted(self, name: str, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What an adapted layer computes of x: (rows, ..., d_in) -> (rows, ..., d_out)."""
        factors = self._factors(name, "A", "B", self._scale_of(name), self._trains(name))
        base, dropout = layer.get_base_layer(), layer.lora_dropout[NAME]
        rows = self._by_rows(name, x)  # (rows, tokens, d_in)
        if isinstance(dropout, nn.Identity) and _is_plain(base, factors.A.dtype, x):
            weight = base.weight.T if layer.fan_in_fan_out else base.weight
            out = linear_with_product(rows, weight, base.bias, self._anchor, factors)
        else:
            out = self._by_rows(name, base(x, *args, **kwargs))
            out = add_product(out, self._by_rows(name, dropout(x)), self._anchor, factors)
        if ("a", name) in self._layout.columns:
            beside = self._factors(name, "a", "b", self._model.scales[name], "")
            out = add_product(out, rows, self._anchor, beside)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _head(self, name: str, module: Any, x: Tensor) -> Tensor:
        """What a linear layer, or a layer norm, of a head computes of x, in its own weight's type."""
        weight = self._own(("H", f"{name}.weight"))
        bias = None if module.bias is None else self._own(("H", f"{name}.bias"))
        rows, write = self._by_rows(name, x).to(weight.dtype), partial(self._write_head, name)
        if isinstance(module, nn.LayerNorm):
            rows = F.layer_norm(rows, module.normalized_shape, eps=module.eps)
        compute = row_affine if isinstance(module, nn.LayerNorm) else row_linear
        out = compute(rows, weight, bias, self._anchor, write)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _factors(self, name: str, a: str, b: str, scale: Scale, trains: str) -> Factors:
        core = self._core("R", name) if a == "A" else None
        heads = self._core("S", name) if a == "A" else None
        write = partial(self._write, name)
        return Factors(self._own((a, name)), self._own((b, name)), core, heads, scale, trains, write)

    def _core(self, side: str, name: str) -> Tensor | None:
        return self._own((side, name)) if (side, name) in self._layout.columns else None

    def _trains(self, name: str) -> str:
        return "".join(side for side in "ABR" if side in self.sides and self._layout.is_trained((side, name)))

    def _scale_of(self, name: str) -> Scale:
        scale = self._scales[name]
        return scale if isinstance(scale, float) else scale[self._owner]

    def _own(self, key: Key) -> Tensor:
        """The matrices of the rows of the present batch."""
        return self._layout.view(self._rows, key)

    def _by_rows(self, name: str, x: Tensor) -> Tensor:
        """x as (rows, tokens, d); raises `NotStackableError` where its first dimension is not that of the rows."""
        if x.dim() < 2 or len(x) != len(self._owner):
            raise NotStackableError(
                f"{name} sees {len(x)} rows where a batch has {len(self._owner)}: its tokens lie in one heap"
            )
        return x.flatten(1, -2) if x.dim() > 2 else x[:, None]

    def _write(self, name: str, side: str, gradient: Tensor) -> None:
        key = (side, name)
        place = self._layout.view(self._gradient, key)
        if key in self._written:  # a layer that is used twice
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self._written.add(key)

    def _write_head(self, name: str, side: str, gradient: Tensor) -> None:
        if "H" in self.sides and self._layout.is_trained(("H", f"{name}.{side}")):
            self._write(f"{name}.{side}", "H", gradient)


def head_layers(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that hold the parameters of the model's heads, by the names that their parameters begin with.

    Raises `NotStackableError` at one that is neither a linear layer nor a layer norm.
    """
    holders = {id(p): key for key, p in model.heads.items()}
    for module in model.net.modules():
        held = [holders[id(p)] for p in module.parameters(recurse=False) if id(p) in holders]
        if held and type(module) not in HEAD_LAYERS:
            raise NotStackableError(f"{held[0].rpartition('.')[0]} is a {type(module).__name__}, trained as a whole")
        if held:
            yield held[0].rpartition(".")[0], module


def _could_be_transposed(batch: Mapping[str, Tensor]) -> bool:
    """Has a batch as many rows as tokens, so that a layer which sees tokens first could not be told from others?"""
    sides = [batch[name].shape for name in ("input_ids", "decoder_input_ids") if name in batch]
    return any(rows == tokens > 1 for rows, tokens in sides)


def _scale(s: float, name: str, gains: Sequence[Mapping[str, float]], like: Tensor) -> Scale:
    """The s of one module with the gains of all clients: a number, or (clients, 1, 1) where they differ."""
    own = [s * gain.get(name, 1.0) for gain in gains] or [s]
    return own[0] if len(set(own)) == 1 else like.new_tensor(own)[:, None, None]


def _is_plain(base: Any, dtype: torch.dtype, x: Tensor) -> bool:
    """Is this a linear layer (or GPT-2's transposed one) that nothing has changed, of the same type as its input?"""
    if type(base).__name__ not in ("Linear", "Conv1D") or "forward" in base.__dict__:
        return False
    return bool(base.weight.dtype == x.dtype == dtype) and not base._forward_hooks
