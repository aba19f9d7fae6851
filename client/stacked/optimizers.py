"""The optimizers of many clients as operations on theta (clients, P): each client's rates, decay and steps are its own.

They do what torch's AdamW and SGD do, as `fedlora.models.optimizer` sets them up for one client; a client that has no
step to do keeps its row and its moments.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedlora.client.stacked.layout import Layout
from fedlora.jobs import Job
from fedlora.models.model import Model
from fedlora.models.optimizer import full_rate, lr_factor
from fedlora.sections import Training

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of torch's AdamW


class ClientsOptimizer(Protocol):
    """The optimizer of a cohort."""

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, chosen: Tensor) -> None:
        """Change theta (clients, P_t) in place for the clients at these places; the others stay.

        `factors`, (clients, 1), are those of the schedule on each client's rates.
        """
        ...


def make(layout: Layout, model: Model, jobs: Sequence[Job], dtype: torch.dtype) -> ClientsOptimizer:
    """The optimizer of the clients that do these jobs, which all name the same kind of optimizer."""
    rates = torch.stack([_rates(layout, model, job.training, dtype) for job in jobs]).to(model.device)
    decay = column([job.training.weight_decay for job in jobs], rates)
    if jobs[0].training.optimizer == "sgd":
        return SGD(rates, decay, column([job.training.momentum for job in jobs], rates))
    return AdamW(rates, decay)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number a client: (clients, 1), of the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _rates(layout: Layout, model: Model, training: Training, dtype: torch.dtype) -> Tensor:
    """The rate of every column before the schedule's factor: (P_t,)."""
    rates = torch.empty(layout.trained, dtype=dtype)
    for (side, module), c in layout.columns.items():
        if c.end <= layout.trained:
            rates[c.begin : c.end] = full_rate(training, side, is_head=side == "H" and module in model.heads)
    return rates


def lr_factors(jobs: Sequence[Job], steps: Sequence[int], step: int) -> list[float]:
    """The schedule's factor of each client in a step, counted from 0, of its own `steps`; 0 if it has finished."""
    return [_lr_factor(job, n, step) if step < n else 0.0 for job, n in zip(jobs, steps, strict=True)]


def _lr_factor(job: Job, steps: int, step: int) -> float:
    began, ended = ((job.round + n / steps) / job.rounds for n in (step, step + 1))
    return lr_factor(job.training, began=began, ended=ended)


def clip_norms(gradient: Tensor, largest: Tensor) -> None:
    """Shorten in place each client's gradient to a norm of at most `largest`, (clients, 1); 0 leaves it as it is."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    shorter = (largest / (norms + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
    gradient.mul_(torch.where(largest > 0, shorter, 1.0))


class AdamW:
    """AdamW with decoupled weight decay, https://arxiv.org/abs/1711.05101."""

    def __init__(self, rates: Tensor, decay: Tensor) -> None:
        self._rates, self._decay = rates, decay
        self._mean, self._square = torch.zeros_like(rates), torch.zeros_like(rates)
        self._steps = torch.zeros_like(decay)  # of each client, (clients, 1)

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, chosen: Tensor) -> None:
        g, rates = gradient[chosen], self._rates[chosen] * factors[chosen]
        self._steps[chosen] += 1
        t = self._steps[chosen]
        mean = self._mean[chosen].lerp_(g, 1 - BETA1)
        square = self._square[chosen].mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        self._mean[chosen], self._square[chosen] = mean, square
        size = (square / (1 - BETA2**t)).sqrt_().add_(EPSILON)
        decayed = theta[chosen] * (1 - rates * self._decay[chosen])
        theta[chosen] = decayed - rates / (1 - BETA1**t) * mean / size


class SGD:
    """Gradient descent with momentum, the first step's gradient being its first momentum."""

    def __init__(self, rates: Tensor, decay: Tensor, momentum: Tensor) -> None:
        self._rates, self._decay, self._momentum = rates, decay, momentum
        self._velocity = torch.zeros_like(rates)

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, chosen: Tensor) -> None:
        g = gradient[chosen] + self._decay[chosen] * theta[chosen]
        self._velocity[chosen] = self._momentum[chosen] * self._velocity[chosen] + g
        theta[chosen] -= self._rates[chosen] * factors[chosen] * self._velocity[chosen]
