"""How a client's optimizer steps, whether its gradients are private or not: rates, groups, schedule, FedProx."""

from collections.abc import Mapping, Sequence
from math import ceil, cos, pi

import torch
from torch import Tensor, nn

from fedlora.sections import Training

from .model import Model


def attract(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's mu/2 times the squared distance to the start."""
    for p, p0 in zip(parameters, start, strict=True) if mu else ():
        if p.grad is not None:
            p.grad.add_(p.detach() - p0, alpha=mu)


def make(training: Training, model: Model, sides: Mapping[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """A group for each learning rate there is, as it is where the schedule's factor is one."""
    heads = {id(p) for p in model.heads.values()}  # side H may hold other things too
    groups: dict[float, list[nn.Parameter]] = {}
    for side, parameters in sides.items():
        for p in parameters:
            rate = training.lr * (training.lora_plus if side == "B" else 1)
            groups.setdefault((training.head_lr or rate) if id(p) in heads else rate, []).append(p)
    each = [{"params": ps, "full_lr": rate} for rate, ps in groups.items()]
    if training.optimizer == "sgd":
        return torch.optim.SGD(each, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(each, lr=training.lr, weight_decay=training.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, training: Training, progress: float) -> None:
    """Give every group its learning rate at this share of the whole run."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor(training, progress)


def count_steps(training: Training, n: int) -> int:
    """Optimizer steps of a client with n examples in a round."""
    if training.steps:
        return training.steps
    return max(1, round(training.epochs * ceil(n / (training.batch_size * training.accumulate))))


def factor(training: Training, progress: float) -> float:
    """The learning rate's factor at this share of the whole run, so that the schedule goes on over the rounds."""
    if progress < training.warmup:
        return progress / training.warmup
    left = (1 - progress) / (1 - training.warmup) if training.warmup < 1 else 1.0
    if training.schedule == "linear":
        return left
    if training.schedule == "cosine":
        return (1 + cos(pi * (1 - left))) / 2
    return 1.0
