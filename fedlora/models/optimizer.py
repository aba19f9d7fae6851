"""A client's optimizer, for private and plain gradients alike: rates, parameter groups, schedule, FedProx."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import cos, fsum, pi
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.jobs import Job
from fedlora.jobs import count_steps as count_steps
from fedlora.own_code import find_own
from fedlora.sections import Training

from .model import Model

MOST_RATES = 4096  # that are added up one by one


def add_proximal_gradient(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add to the gradients that of FedProx's term, mu/2 times the squared distance to the start."""
    if not mu:
        return
    for p, p0 in zip(parameters, start, strict=True):
        if p.grad is not None:
            p.grad.add_(p.detach() - p0, alpha=mu)


def in_turn(
    model: Model, sides: Mapping[str, list[nn.Parameter]], job: Job, steps: int
) -> Iterator[tuple[int, Mapping[str, list[nn.Parameter]]]]:
    """Yield every step, counted from 0, with the parameters that it trains, by side; only these get gradients in it.

    A side that is not in turn has no gradient at all. With one of zero, an optimizer would move it by its momentum and
    weight decay.
    """
    for turn, stretch in job.stretches(steps):
        now = turn_to(model, sides, job, turn)
        for step in stretch:
            yield step, now


def turn_to(
    model: Model, sides: Mapping[str, list[nn.Parameter]], job: Job, turn: str
) -> Mapping[str, list[nn.Parameter]]:
    """Let gradients reach the sides of this turn alone, and return their parameters by side."""
    if not job.turns:
        return sides
    model.set_trainable(turn)
    return {side: parameters for side, parameters in sides.items() if side in turn}


def smooth_gradients(sides: Mapping[str, Sequence[nn.Parameter]], taps: Sequence[float]) -> None:
    """Filter the gradients of A along d_in and those of B along d_out, which are their rows' and columns' features.

    Other sides have no such axis, nor has VeRA's vector in the place of A; they keep the gradients they have.
    """
    for side, axis in (("A", 1), ("B", 0)):
        for p in sides.get(side, ()) if taps else ():
            if p.grad is not None and p.dim() > axis:
                p.grad.copy_(smooth(p.grad, taps, axis))


def smooth(x: Tensor, taps: Sequence[float], axis: int) -> Tensor:
    """The convolution of x with an odd number of taps along an axis, mirrored at its edges so that these repeat.

    As a matrix this is symmetric and its rows sum to 1, so that means and directions of descent stay such.
    """
    size, half = x.shape[axis], len(taps) // 2
    places = torch.arange(-half, size + half, device=x.device) % (2 * size)
    mirrored = torch.where(places < size, places, 2 * size - 1 - places)
    wide = x.index_select(axis, mirrored)
    return sum((tap * wide.narrow(axis, i, size) for i, tap in enumerate(taps)), torch.zeros_like(x))


def make(training: Training, model: Model, sides: Mapping[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer of these parameters, with one group for each learning rate.

    A group's `full_lr` is its rate before the schedule's factor: `lr`, for B `lr` times `lora_plus` (LoRA+), for a
    head `head_lr` if it is set, for the scales of a core's heads (side S) the lower of these.
    """
    heads = {id(p) for p in model.heads.values()}  # side H may hold other things too
    rated = [(full_rate(training, side, is_head=id(p) in heads), p) for side in sides for p in sides[side]]
    return of_groups(training, rated)


def of_groups(training: Training, rated: Iterable[tuple[float, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer of parameters, each given with its rate. Raises `ConfigError` for own code that makes none."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for rate, p in rated:
        by_rate.setdefault(rate, []).append(p)
    groups = [{"params": parameters, "full_lr": rate} for rate, parameters in by_rate.items()]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay)
    return _own(training, [group | {"lr": group["full_lr"]} for group in groups])


def _own(training: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that a class or function of the user's own makes of these groups of parameters.

    A class of torch's is given the groups alone, with `weight_decay` in each; a function the settings besides.
    """
    make, where = find_own("train.optimizer", training.optimizer), f"train.optimizer = {training.optimizer}"
    try:
        if isinstance(make, type) and issubclass(make, torch.optim.Optimizer):
            made = make([group | {"weight_decay": training.weight_decay} for group in groups])  # type: ignore[call-arg]
        else:
            made = make(groups, training)
    except Exception as e:  # whatever a user's code raises
        raise ConfigError(f"{where} could not be made of groups of parameters: {type(e).__name__}: {e}") from e
    if not isinstance(made, torch.optim.Optimizer) or not all("full_lr" in group for group in made.param_groups):
        raise ConfigError(f"{where} is to make a torch.optim.Optimizer of the groups that it is given")
    return made


def full_rate(training: Training, side: str, *, is_head: bool) -> float:
    """A parameter's learning rate before the schedule's factor."""
    if side == "S":  # Adam moves a scale by its whole rate, however small the head that it multiplies
        return min(training.lr, training.head_lr or training.lr)
    if is_head and training.head_lr:
        return training.head_lr
    return training.lr * (training.lora_plus if side == "B" else 1)


def set_rates(optimizer: torch.optim.Optimizer, training: Training, job: Job, *, step: int, steps: int) -> None:
    """Set every group's learning rate for a step, counted from 0, of this round's `steps`."""
    factor = scheduled_factor(training, job, step=step, steps=steps)
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


def sum_of_rates(job: Job, examples: int) -> float:
    """The sum of the learning rates of the steps that a client with so many examples takes in a job's round.

    Of a job with more than `MOST_RATES` steps it is that of as many, evenly spread, times what they stand for: the
    count of examples is the client's own word.
    """
    steps = job.privacy.steps if job.privacy else count_steps(job.training, examples)
    n = min(steps, MOST_RATES)
    factors = [scheduled_factor(job.training, job, step=step, steps=n) for step in range(n)]
    return job.training.lr * fsum(factors) * steps / n


def scheduled_factor(training: Training, job: Job, *, step: int, steps: int) -> float:
    """The schedule's factor of the learning rate of a step, counted from 0, of this round's `steps`."""
    began, ended = ((job.round + n / steps) / job.rounds for n in (step, step + 1))
    return lr_factor(training, began=began, ended=ended)


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
