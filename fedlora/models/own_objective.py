"""An objective with a loss, or with a figure, of the user's own.

    loss:           f(scores, targets) -> (targets,)      what training lowers
    target metric:  f(scores, targets) -> (targets,)      what an evaluation shows besides, its mean over all targets

Both are given the targets that count, and their scores: of a language model (targets, vocabulary) and the tokens, of a
classifier (targets, classes) and the classes, of several labels (targets, labels) and 0 or 1, of a number (targets,)
twice, of preferences the rewards of both answers (targets, 2) and 0. Each target is judged by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.encoding.encoder import Example
from fedlora.errors import ConfigError
from fedlora.metrics import Metrics

from .objectives import Batch, Objective

TargetFunction = Callable[[Tensor, Tensor], Tensor]  # of scores and targets, a number for each target


@dataclass(frozen=True)
class OwnObjective:
    """An objective whose loss, or one more of whose figures, is a function of the user's own."""

    inner: Objective
    setting: str  # that names the function, as errors show it
    path: str
    function: TargetFunction
    is_loss: bool  # or else a figure of an evaluation
    one_by_one: bool = False  # does the function see one example at a time, so that none has a say in another's loss?

    @property
    def rows(self) -> int:
        return self.inner.rows

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.inner.aligned(logits, batch)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        return self._of_counted(scores, targets) if self.is_loss else self.inner.losses(scores, targets)

    def counted(self, targets: Tensor) -> Tensor:
        return self.inner.counted(targets)

    def count(self, example: Example) -> int:
        return self.inner.count(example)

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        found = self.inner.metrics(scores, targets, examples=examples)
        if self.is_loss:
            return found
        total = float(self._of_counted(scores, targets).double().sum())
        return replace(found, own={self.path.partition(":")[2]: total})

    def _of_counted(self, scores: Tensor, targets: Tensor) -> Tensor:
        """What the function makes of the targets that count, and 0 for the others: (targets,)."""
        counts = self.inner.counted(targets)
        if not bool(counts.any()):
            return 0 * scores.flatten(1).sum(1) if scores.dim() > 1 else 0 * scores  # with a gradient, of zero
        found = self.numbers(scores[counts], targets[counts])
        return found.new_zeros(len(targets)).masked_scatter(counts, found)

    def numbers(self, scores: Tensor, targets: Tensor) -> Tensor:
        """What the function makes of targets that count: (targets,). Raises `ConfigError` where it makes no such."""
        try:
            found = self.function(scores, targets)
        except Exception as e:  # whatever a user's function raises
            shapes = f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)}"
            raise ConfigError(f"{self.setting} = {self.path} failed on {shapes}: {type(e).__name__}: {e}") from e
        if not isinstance(found, Tensor) or found.shape != targets.shape[:1] or not found.is_floating_point():
            got = f"a {found.dtype} of {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"{self.setting} = {self.path} is to give a number for each target, ({len(targets)},), and gave {got}; "
                'leave their mean out, as reduction="none" does'
            )
        return found


def losses_by_example(objective: Objective, scores: Tensor, targets: Tensor, examples: int) -> Tensor:
    """The losses of aligned scores and targets, (examples, targets of each); see `OwnObjective.one_by_one`."""
    if not isinstance(objective, OwnObjective) or not objective.one_by_one:
        return objective.losses(scores, targets).view(examples, -1)
    pairs = zip(scores.chunk(examples), targets.chunk(examples), strict=True)
    return torch.stack([objective.losses(own, its) for own, its in pairs])


def mixes_targets(objective: OwnObjective, scores: Tensor, targets: Tensor) -> bool:
    """Whether the function gives a target another number beside others than alone, or another when asked again."""
    counts = objective.counted(targets)
    scores, targets = scores[counts].detach(), targets[counts]
    together = objective.numbers(scores, targets)
    alone = torch.cat([objective.numbers(scores[[i]], targets[[i]]) for i in range(len(targets))])
    return not torch.allclose(together.detach(), alone.detach(), rtol=1e-4, atol=1e-6)


def with_own_metric(objective: Objective, path: str, function: TargetFunction) -> OwnObjective:
    """The objective with one more figure."""
    return OwnObjective(objective, "eval.target_metric", path, function, is_loss=False)


def with_own_loss(objective: Objective, path: str, function: TargetFunction, *, one_by_one: bool) -> OwnObjective:
    """The objective with a loss of the user's own."""
    return OwnObjective(objective, "train.loss", path, function, is_loss=True, one_by_one=one_by_one)
