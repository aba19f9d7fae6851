"""Code of a user's own, as a setting names it: losses, regularisers, an optimizer, a figure."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.lora import LoRA

HERE = "tests.support.own_training"
SEEN: list[int] = []  # targets of each call of `noted`


def task_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets, reduction="none")


def focal(scores: Tensor, targets: Tensor) -> Tensor:
    loss = task_loss(scores, targets)
    return (1 - (-loss).exp()) ** 2 * loss


def noted(scores: Tensor, targets: Tensor) -> Tensor:
    SEEN.append(len(targets))
    return focal(scores, targets)


def centred(scores: Tensor, targets: Tensor) -> Tensor:
    """A loss in which every target has a share in the others'."""
    loss = task_loss(scores, targets)
    return (loss - loss.mean()) ** 2


def mean(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets)


def right(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(-1) == targets).float()


def near_the_start(lora: LoRA, start: LoRA) -> Tensor:
    """What train.prox = 0.5 adds."""
    gaps = [(t - start.side(s)[m]).square().sum() for s, m, t in lora.matrices()]
    return 0.25 * torch.stack(gaps).sum()


def ridge(lora: LoRA, start: LoRA) -> Tensor:
    return torch.stack([a.square().sum() for a in lora.A.values()]).sum()


def vector(lora: LoRA, start: LoRA) -> Tensor:
    return torch.ones(3)


class Lion(torch.optim.Optimizer):
    def __init__(self, groups: Any, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(groups, {"betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.lerp(p.grad, mean, fast).sign())
                mean.lerp_(p.grad, 1 - slow)


def by_settings(groups: Any, training: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, alpha=0.9, eps=1e-3, weight_decay=training.weight_decay)


def nothing(groups: Any, training: Any) -> None:
    return None
