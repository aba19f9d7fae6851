"""Losses of a language model over its learned tokens alone, in pieces, without a table of all scores.

A plain pass computes the scores of every token, learned or not, (tokens, vocabulary), copies them to leave out each
row's last, and holds the softmax and its gradient beside them. Here the network's output layer is given the states of
the learned tokens only, CHUNK at a time; the gradient of a piece is made in the memory of its softmax and taken back
through the layer at once, so that only the gradient of the states, (tokens, width), is kept for the backward pass.

Forward and backward of the output layer with its loss, in milliseconds (one thread of a Zen 3, float32):

    | tokens x width x vocabulary | the two products alone | plain | here |
    |-----------------------------|------------------------|-------|------|
    | 1000 x 192 x 2048           | 19                     | 25    | 23   |
    | 400 x 576 x 49152           | 627                    | 789   | 723  |

What is saved is memory, 400 MB of the second row, and time where only answers are learned: their share of all tokens.

A network is computed so if its output layer is a plain frozen linear layer and its scores are what that layer returns:
one that divides them, or bounds them, after the layer is not, and neither is one whose output layer is adapted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlora.encoding.encoder import IGNORED
from fedlora.lora import at_least_float32
from fedlora.metrics import Metrics
from fedlora.models.model import Model
from fedlora.models.objectives import DPO, Tokens
from fedlora.models.own_objective import losses_by_example
from fedlora.seeds import rewinding

from .dropout import rewinding as rewinding_dropout
from .replaced import forward_of

CHUNK = 256  # states at a time, at least
SCORES = {"cpu": 2**20, "cuda": 2**27}  # scores at a time, where that is more
Layer = Callable[[Tensor], Tensor]

_refused: WeakSet[nn.Module] = WeakSet()  # networks whose scores are not what their output layer returns


@dataclass(frozen=True, eq=False)
class Learned:
    """The learned tokens of a batch: the states that their scores are made of, and what they are to be."""

    states: Tensor  # (learned, width)
    targets: Tensor  # (learned,)
    row: Tensor  # (learned,), the row of each
    rows: int
    layer: Layer  # from states to scores (learned, vocabulary)
    words: int  # in the vocabulary


def example_losses(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Each example's loss, summed over its targets: (examples,); as the model's objective has it."""
    objective = model.objective
    learned = _learned(model, batch) if isinstance(objective, Tokens | DPO) else None
    if learned is None:
        scores, targets = model.logits(batch)
        return losses_by_example(objective, scores, targets, len(batch["labels"]) // objective.rows).sum(1)
    by_row = _row_losses(learned)
    if isinstance(objective, DPO):
        reference = batch["reference"].to(by_row.device)
        return objective.losses(*objective.rewards(-by_row, reference))
    return by_row


@torch.no_grad()
def metrics_by_set(model: Model, batch: dict[str, Tensor], counts: Sequence[int]) -> list[Metrics]:
    """How good the model is on so many examples of a batch after one another, as its objective has it."""
    learned = _learned(model, batch) if isinstance(model.objective, Tokens) else None
    if learned is None:
        return _plain_metrics(model, batch, counts)
    sets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(learned.row.device)[learned.row]
    found = [_loss_and_right(learned.layer(states), targets) for states, targets in _pieces(learned)]
    sums = torch.zeros(len(counts), 3, dtype=torch.float64, device=sets.device)  # of targets, losses and right ones
    if found:
        sums.index_add_(0, sets, torch.cat(found))
    return [Metrics(n, int(t), loss, int(r)) for n, (t, loss, r) in zip(counts, sums.tolist(), strict=True)]


def share_refusal(net: nn.Module, twins: Iterable[nn.Module]) -> None:
    """Let what was found out of a network hold for others of the same architecture."""
    if net in _refused:
        _refused.update(twins)


def _plain_metrics(model: Model, batch: dict[str, Tensor], counts: Sequence[int]) -> list[Metrics]:
    scores, targets = (t.view(sum(counts), -1, *t.shape[1:]) for t in model.logits(batch))
    by_set = zip(torch.split(scores, [*counts]), torch.split(targets, [*counts]), counts, strict=True)
    return [model.objective.metrics(s.flatten(0, 1), t.flatten(0, 1), examples=n) for s, t, n in by_set]


def _loss_and_right(scores: Tensor, targets: Tensor) -> Tensor:
    """For each token 1, its loss, and whether it has the highest score: (tokens, 3)."""
    losses = F.cross_entropy(at_least_float32(scores), targets, reduction="none").double()
    return torch.stack([torch.ones_like(losses), losses, (scores.argmax(-1) == targets).double()], dim=1)


class _TokenLosses(torch.autograd.Function):
    """The cross-entropy of every state, with the gradient of the states made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, learned: Learned) -> Tensor:
        wanted: bool = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for piece, targets in _pieces(replace(learned, states=states.detach())):
            piece.requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                scores = learned.layer(piece)
            p = F.log_softmax(at_least_float32(scores.detach()), dim=-1)  # (piece, vocabulary)
            losses.append(-p.gather(1, targets[:, None])[:, 0])
            if wanted:
                p.exp_().scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
                gradients += torch.autograd.grad(scores, piece, p.to(scores.dtype))
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(states))
        return torch.cat(losses) if losses else at_least_float32(states.new_zeros(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (by_state,) = ctx.saved_tensors
        return by_state * gradients[0][:, None].to(by_state.dtype), None


def _row_losses(learned: Learned) -> Tensor:
    """The losses of each row's learned tokens, added up: (rows,)."""
    losses: Tensor = _TokenLosses.apply(learned.states, learned)  # type: ignore[no-untyped-call]
    return losses.new_zeros(learned.rows).index_add(0, learned.row, losses)


def _learned(model: Model, batch: Mapping[str, Tensor]) -> Learned | None:
    """The learned tokens of a batch, from one forward pass; None if the network's scores cannot be made of them."""
    net, layer = model.net, _output_layer(model.net)
    if layer is None or net in _refused:
        return None
    targets = _aligned(model, batch["labels"])  # (rows, tokens)
    places = (targets.flatten() != IGNORED).nonzero()[:, 0]  # on the CPU, where a batch is collated
    device, rewinds = model.device, (rewinding(model.device), rewinding_dropout())
    at, states = places.to(device), list[Tensor]()

    def only_learned(x: Tensor) -> Tensor:
        states.append(x.flatten(0, -2).index_select(0, at))
        return states[-1]

    with forward_of(layer, only_learned):
        returned = _returned(model, batch)
    if len(states) != 1 or returned is not states[0]:
        _refused.add(net)
        for rewind in rewinds:  # what was drawn: a resumed run, whose process finds this out anew, has the same bits
            rewind()
        return None
    rows, length = targets.shape

    def scores(x: Tensor) -> Tensor:
        with model.products():
            return layer(x)  # type: ignore[no-any-return]

    own, row = targets.flatten()[places].to(device), (places // length).to(device)
    return Learned(states[0], own, row, rows, scores, layer.out_features)


def _returned(model: Model, batch: Mapping[str, Tensor]) -> Tensor | None:
    """What the network returns as scores; None if it cannot do with fewer than it is used to."""
    try:
        return model.outputs(batch)
    except (RuntimeError, IndexError, ValueError):  # of shapes unfit for what comes after the output layer
        return None


def _output_layer(net: Any) -> nn.Linear | None:
    """The layer that scores the words; None where it is no plain linear layer that is frozen."""
    layer = net.get_base_model().get_output_embeddings()
    if type(layer) is not nn.Linear or any(p.requires_grad for p in layer.parameters()):
        return None
    return layer


def _aligned(model: Model, labels: Tensor) -> Tensor:
    """The target of every position of the network's output, (rows, tokens); -100 where there is none."""
    objective = model.objective
    if isinstance(objective, Tokens) and objective.shifted:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _pieces(learned: Learned) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield states and targets, some at a time, whose scores fit into memory that is near."""
    size = max(CHUNK, SCORES.get(learned.states.device.type, 0) // learned.words)
    yield from zip(torch.split(learned.states, size), torch.split(learned.targets, size), strict=True)
