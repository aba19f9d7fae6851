"""What a step's gradient has in it that no example has a share in: of FedProx, of a regulariser, a job's correction.

All three are functions of the parameters and of what the server sent. A private step adds them after the noise, where
they tell nothing of any record.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.jobs import Job, trained_letters
from fedlora.lora import SIDES, LoRA, from_matrices
from fedlora.own_code import find_own

from .model import Model
from .optimizer import add_proximal_gradient

Regulariser = Callable[[LoRA, LoRA], Tensor]  # of the trained sides, and of these at the round's start: a number


@dataclass(frozen=True, eq=False)
class AddedGradients:
    """What is added to the gradients of the parameters that a job trains, from where they stand when this is made."""

    job: Job
    keys: list[tuple[str, str]]  # side and module of each parameter
    parameters: list[nn.Parameter]
    start: list[Tensor]
    correction: list[Tensor | None]

    def add(self) -> None:
        """Add to every gradient that there is."""
        add_proximal_gradient(self.parameters, self.start, self.job.training.prox)
        for p, correction in zip(self.parameters, self.correction, strict=True):
            if p.grad is not None and correction is not None:
                p.grad.add_(correction)
        if regulariser := self.job.training.regulariser:
            self._add_regulariser(regulariser)

    def _add_regulariser(self, path: str) -> None:
        now, start = (
            from_matrices((*key, t) for key, t in zip(self.keys, tensors, strict=True) if key[0] in SIDES)
            for tensors in (self.parameters, self.start)
        )
        reached = [p for p in self.parameters if p.grad is not None]
        for p, g in zip(reached, regulariser_gradients(path, now, start, reached), strict=True):
            if p.grad is not None and g is not None:
                p.grad.add_(g)


def added_gradients(model: Model, job: Job) -> AddedGradients:
    """What a job adds to the gradients of the parameters that it trains, which the model has now as its start."""
    named = list(model.trained(trained_letters(job)))
    keys, parameters = [(side, module) for side, module, _ in named], [p for _, _, p in named]
    corrected = {(side, module): t for side, module, t in job.correction.matrices()}
    given = [corrected.get(key) for key in keys]
    correction = [c if c is None else c.to(p.device, p.dtype) for c, p in zip(given, parameters, strict=True)]
    return AddedGradients(job, keys, parameters, [p.detach().clone() for p in parameters], correction)


def regulariser_gradients(
    path: str, lora: LoRA, start: LoRA, of: list[nn.Parameter] | list[Tensor]
) -> list[Tensor | None]:
    """The gradients of a regulariser for tensors that `lora` is made of; None for one that it leaves out.

    Raises `ConfigError` for a function that cannot be imported, fails, or gives no number.
    """
    function: Regulariser = find_own("train.regulariser", path)
    with torch.enable_grad():
        try:
            value = function(lora, start)
        except Exception as e:  # whatever a user's function raises
            raise ConfigError(f"train.regulariser = {path} failed: {type(e).__name__}: {e}") from e
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"train.regulariser = {path} is to give one number as a tensor, and gave {got}")
        if not value.requires_grad:
            return [None] * len(of)
        return list(torch.autograd.grad(value.sum(), of, allow_unused=True))
