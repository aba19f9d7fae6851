"""The optimizers of many clients as operations on theta (clients, P): each client's rates, decay and steps are its own.

They do what torch's AdamW and SGD do, as `fedlora.models.optimizer` sets them up for one client; a client that has no
step to do keeps its row and its moments.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log
from typing import Protocol

import torch
from torch import Tensor, nn

from fedlora.client.stacked.layout import Key, Layout
from fedlora.jobs import Job
from fedlora.lora import LoRA
from fedlora.models.model import Model
from fedlora.models.optimizer import full_rate, of_groups, scheduled_factor
from fedlora.sections import OPTIMIZERS, Training

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of torch's AdamW


class ClientsOptimizer(Protocol):
    """The optimizer of a cohort."""

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, places: Tensor) -> None:
        """Change theta (clients, P_t) in place for the clients at these places; the others stay.

        `factors`, (clients, 1), are those of the schedule on each client's rates.
        """
        ...


def make(
    layout: Layout, model: Model, jobs: Sequence[Job], starts: Sequence[LoRA], dtype: torch.dtype, sides: str
) -> ClientsOptimizer:
    """The optimizer of these sides of the clients that do these jobs from these starts.

    All jobs name the same kind of optimizer.
    """
    own = layout.columns_of(sides)
    settings = [job.training for job in jobs]
    if settings[0].optimizer not in OPTIMIZERS:
        return OneForEach(layout, model, settings, [start.only(sides) for start in starts], first=own.start)
    alike = all(training == settings[0] for training in settings)  # then one row of rates is that of all
    made = [_rates(layout, model, training, dtype)[own] for training in (settings[:1] if alike else settings)]
    rates = torch.stack(made).to(model.device)
    decay = column([training.weight_decay for training in settings], rates)
    if settings[0].optimizer == "sgd":
        return SGD(rates, decay, column([training.momentum for training in settings], rates))
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
    return [_factor_of(job, n, step) for job, n in zip(jobs, steps, strict=True)]


def _factor_of(job: Job, steps: int, step: int) -> float:
    return scheduled_factor(job.training, job, step=step, steps=steps) if step < steps else 0.0


def clip_norms(gradient: Tensor, largest: Tensor) -> None:
    """Shorten in place each client's gradient to a norm of at most `largest`, (clients, 1); 0 leaves it as it is."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    shorter = (largest / (norms + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
    gradient.mul_(torch.where(largest > 0, shorter, 1.0))


class AdamW:
    """AdamW with decoupled weight decay, https://arxiv.org/abs/1711.05101."""

    def __init__(self, rates: Tensor, decay: Tensor) -> None:
        self._rates, self._decay, self._decays = rates, decay, bool(decay.any())
        shape = len(decay), rates.shape[1]
        self._mean, self._square = rates.new_zeros(shape), rates.new_zeros(shape)
        self._steps = torch.zeros_like(decay)  # of each client, (clients, 1)

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, places: Tensor) -> None:
        g, rates, decay = _rows(gradient, places), _rates_at(self._rates, places), _rows(self._decay, places)
        factors = _rows(factors, places)
        with _changed(places, theta, self._mean, self._square, self._steps) as (theta, mean, square, t):
            t += 1
            mean.lerp_(g, 1 - BETA1)
            square.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            if self._decays:
                theta.mul_((rates * (-factors * decay)).add_(1))
            size = square.sqrt().div_(_begun(BETA2, t).sqrt()).add_(EPSILON)
            theta.sub_(torch.div(mean, size, out=size).mul_(rates).mul_(factors / _begun(BETA1, t)))


class SGD:
    """Gradient descent with momentum, the first step's gradient being its first momentum."""

    def __init__(self, rates: Tensor, decay: Tensor, momentum: Tensor) -> None:
        self._rates, self._decay, self._momentum = rates, decay, momentum
        self._velocity = rates.new_zeros(len(decay), rates.shape[1])

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, places: Tensor) -> None:
        g, rates, factors = _rows(gradient, places), _rates_at(self._rates, places), _rows(factors, places)
        decay, momentum = _rows(self._decay, places), _rows(self._momentum, places)
        with _changed(places, theta, self._velocity) as (theta, velocity):
            velocity.mul_(momentum).add_(g).addcmul_(decay, theta)
            theta.sub_((velocity * rates).mul_(factors))


class OneForEach:
    """An optimizer of the user's own for each client, of parameters that have the shapes they have where it is alone.

    They lie beside theta: such an optimizer keeps what it likes of them, by matrix.
    """

    def __init__(
        self, layout: Layout, model: Model, settings: Sequence[Training], starts: Sequence[LoRA], *, first: int
    ) -> None:
        """`starts` have the sides that it steps, whose first column of theta is `first`."""
        self._layout, self._first = layout, first
        self._parameters: list[dict[Key, nn.Parameter]] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        for training, start in zip(settings, starts, strict=True):
            own = {
                (s, m): nn.Parameter(t.to(model.device, model.adapter_dtype, copy=True)) for s, m, t in start.matrices()
            }
            rated = [(full_rate(training, s, is_head=s == "H" and m in model.heads), p) for (s, m), p in own.items()]
            self._parameters.append(own)
            self._optimizers.append(of_groups(training, rated))

    def step(self, theta: Tensor, gradient: Tensor, factors: Tensor, places: Tensor) -> None:
        for place in places.tolist():
            optimizer, parameters = self._optimizers[place], self._parameters[place]
            for key, p in parameters.items():
                p.grad = self._matrix(gradient, place, key, p).contiguous()
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * float(factors[place])
            optimizer.step()
            for key, p in parameters.items():
                self._matrix(theta, place, key, p).copy_(p.detach())

    def _matrix(self, rows: Tensor, place: int, key: Key, like: Tensor) -> Tensor:
        """The matrix of one client, of the shape it has alone, in the memory of its row."""
        column = self._layout.columns[key]
        found = rows[place, column.begin - self._first : column.end - self._first].view(column.shape)
        found = found.transpose(-2, -1) if key[0] == "B" else found
        return found[tuple(slice(n) for n in like.shape)]


def _begun(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, a moment's share after t steps from zero; in float32 1 - 0.999 itself would be 1e-5 off."""
    return torch.expm1(t * log(beta)).neg_()


def _rates_at(rates: Tensor, places: Tensor) -> Tensor:
    """The rates of the clients at these places: one row for each, or one of all."""
    return rates if len(rates) == 1 else _rows(rates, places)


def _rows(matrix: Tensor, places: Tensor) -> Tensor:
    """The rows at these places, which are in order; the matrix itself where they are all of them."""
    return matrix if len(places) == len(matrix) else matrix[places]


@contextmanager
def _changed(places: Tensor, *matrices: Tensor) -> Iterator[list[Tensor]]:
    """The rows at these places of every matrix, to be changed in place within the block; the others stay."""
    chosen = [_rows(matrix, places) for matrix in matrices]
    yield chosen
    for matrix, rows in zip(matrices, chosen, strict=True):
        if rows is not matrix:
            matrix[places] = rows
