"""A client's optimizer, for private and plain gradients alike: rates, parameter groups, schedule, FedProx."""

from collections.abc import Mapping, Sequence
from math import ceil, cos, pi

import torch
from torch import Tensor, nn

from fedlora.jobs import Job
from fedlora.sections import Training

from .model import Model


def add_proximal_gradient(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add to the gradients that of FedProx's term, mu/2 times the squared distance to the start."""
    if not mu:
        return
    for p, p0 in zip(parameters, start, strict=True):
        if p.grad is not None:
            p.grad.add_(p.detach() - p0, alpha=mu)


def make(training: Training, model: Model, sides: Mapping[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer of these parameters, with one group for each learning rate.

    A group's `full_lr` is its rate before the schedule's factor: `lr`, for B `lr` times `lora_plus` (LoRA+), for a
    head `head_lr` if it is set.
    """
    heads = {id(p) for p in model.heads.values()}  # side H may hold other things too
    by_rate: dict[float, list[nn.Parameter]] = {}
    for side, parameters in sides.items():
        for p in parameters:
            by_rate.setdefault(full_rate(training, side, is_head=id(p) in heads), []).append(p)
    groups = [{"params": parameters, "full_lr": rate} for rate, parameters in by_rate.items()]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay)


def full_rate(training: Training, side: str, *, is_head: bool) -> float:
    """A parameter's learning rate before the schedule's factor."""
    if is_head and training.head_lr:
        return training.head_lr
    return training.lr * (training.lora_plus if side == "B" else 1)


def set_rates(optimizer: torch.optim.Optimizer, training: Training, job: Job, *, step: int, steps: int) -> None:
    """Set every group's learning rate for a step, counted from 0, of this round's `steps`."""
    began, ended = ((job.round + n / steps) / job.rounds for n in (step, step + 1))
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * lr_factor(training, began=began, ended=ended)


def count_steps(training: Training, n: int) -> int:
    """The count of optimizer steps of a client with n examples in one round."""
    if training.steps:
        return training.steps
    return max(1, round(training.epochs * ceil(n / (training.batch_size * training.accumulate))))


def lr_factor(training: Training, *, began: float, ended: float) -> float:
    """The schedule's factor of a step's learning rate; the step lies between two shares, 0 to 1, of the whole run.

    The rate rises to that at the step's end and falls from that at its beginning, so that no step has a rate of 0:
    step t of T, counted from 0, has (T - t) / T of a linear schedule, as in `get_linear_schedule_with_warmup` of
    transformers, whose warm-up wastes its first step.
    """
    if began < training.warmup:
        return min(ended / training.warmup, 1.0)
    left = (1 - began) / (1 - training.warmup) if training.warmup < 1 else 1.0
    if training.schedule == "linear":
        return left
    if training.schedule == "cosine":
        return (1 + cos(pi * (1 - left))) / 2
    return 1.0
