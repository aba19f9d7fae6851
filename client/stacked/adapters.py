"""The adapters of many clients in the middle of their training, and the steps that an optimizer takes with them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

from fedlora.client import training
from fedlora.client.stacked import optimizers
from fedlora.client.stacked.layout import Layout, layout_of
from fedlora.client.stacked.optimizers import column
from fedlora.client.stacked.row_pass import NotStackableError, RowPass
from fedlora.client.stacked.row_passes import RowPasses
from fedlora.client.training import Trained, TrainingTask
from fedlora.jobs import trained_letters
from fedlora.lora import LoRA
from fedlora.models.added_gradients import regulariser_gradients
from fedlora.models.model import Model
from fedlora.models.optimizer import smooth

MOST_BYTES = 2**28  # of what a micro-batch gathers and leaves: of each row its own columns of theta, and its gradient


class Adapters:
    """theta (clients, P) of tasks of one group, a gradient beside it, and all that an optimizer keeps of them."""

    def __init__(self, model: Model, tasks: Sequence[TrainingTask], steps: Sequence[int]) -> None:
        """`steps` are those that each client will take in this round."""
        self._tasks, self._jobs, self.steps = tasks, [task.job for task in tasks], steps
        self._starts, self._taken = zip(*(training.start_of(t.job, t.kept) for t in tasks), strict=True)
        check_starts(model, self._starts)
        self.layout = layout_of(self._starts, trained_letters(self._jobs[0]), self._taken)
        dtype = model.adapter_dtype
        rows = [self.layout.flat(*pair, dtype) for pair in zip(self._starts, self._taken, strict=True)]
        self.theta = torch.stack(rows).to(model.device)
        self._trained = self.theta[:, : self.layout.trained]  # the same memory
        self._start = self._trained.clone()
        self.gradient = torch.zeros_like(self._trained)  # (clients, P_t): what the next step follows
        self._job, trains = self._jobs[0], trained_letters(self._jobs[0])  # what all jobs of a group have alike
        parts = trains if self._job.turns else (trains,)  # each with moments of its own, which rest while it rests
        self._optimizers = [
            (sides, own, optimizers.make(self.layout, model, self._jobs, self._starts, dtype, sides))
            for sides, own in ((sides, self.layout.columns_of(sides)) for sides in parts)
        ]
        self._correction = self._flat_corrections(dtype)
        self._is_proximal = any(job.training.prox for job in self._jobs)
        self._prox = column([job.training.prox for job in self._jobs], self.theta)
        gains = [job.gain for job in self._jobs]
        self.rows = RowPasses(partial(RowPass, layout=self.layout, gains=gains), model)

    def _flat_corrections(self, dtype: torch.dtype) -> Tensor | None:
        """What the jobs add to the gradient of every step, (clients, P_t); None where no job adds anything."""
        if not any(job.correction for job in self._jobs):
            return None
        rows = [self.layout.flat_correction(job.correction.only(job.trains), dtype) for job in self._jobs]
        return torch.stack(rows)[:, : self.layout.trained].to(self.theta.device)

    @property
    def most_rows(self) -> int:
        """The rows that a micro-batch may have, by the memory that each takes besides its activations."""
        return most_rows(self.layout, self.theta)

    @contextmanager
    def training(self, model: Model, draws: AbstractContextManager[None]) -> Iterator[None]:
        """Within the block the model trains, and computes each row by its client's columns.

        `draws` is a context in which torch's generators draw the pass's dropout.
        """
        model.offset.set(self._jobs[0].offset)
        model.set_trainable("")
        model.begin_training()
        with model.learning(self._job.training, private=bool(self._job.privacy)), draws, self.rows:
            yield

    def turn_to(self, step: int) -> None:
        """Have gradients found of the sides that this step, counted from 0, trains, and of others none but zeros."""
        self.rows.train(self._job.sides_of(step))

    def places(self, step: int) -> list[int]:
        """The clients that take this step, counted from 0: those that have not finished."""
        return [i for i, steps in enumerate(self.steps) if step < steps]

    def step(self, step: int, clip: Tensor | None = None) -> None:
        """Follow the gradient, with what jobs add to it, and no longer than `clip` (clients, 1) if that is given.

        Of sides that rest in this step the gradient is zero; they stay as they are, and so do their moments.
        """
        turn = set(self._job.sides_of(step))
        in_turn = [(own, optimizer) for sides, own, optimizer in self._optimizers if turn & set(sides)]
        for own, _ in in_turn:
            self._add_gradients(own, step)
        if clip is not None:
            optimizers.clip_norms(self.gradient, clip)
        self._smooth()
        factors = column(optimizers.lr_factors(self._jobs, self.steps, step), self.theta)
        places = torch.tensor(self.places(step), device=self.theta.device)
        for own, optimizer in in_turn:
            optimizer.step(self._trained[:, own], self.gradient[:, own], factors, places)

    def _smooth(self) -> None:
        """Filter the gradients of A and B along their features, which come last in either: B lies transposed."""
        for key in self.layout.columns if self._job.smoothing else ():
            if key[0] in "AB" and self.layout.is_trained(key):
                own = self.layout.view(self.gradient, key)
                own.copy_(smooth(own, self._job.smoothing, own.dim() - 1))

    def _add_gradients(self, own: slice, step: int) -> None:
        """Add to these columns of the gradient what no example has a share in; see `AddedGradients`."""
        if self._is_proximal:
            self.gradient[:, own].add_(self._prox * (self._trained[:, own] - self._start[:, own]))
        if self._correction is not None:
            self.gradient[:, own].add_(self._correction[:, own])
        for place in self.places(step):
            if path := self._jobs[place].training.regulariser:
                self.gradient[place, own] += self._of_regulariser(path, place)[own]

    def _of_regulariser(self, path: str, place: int) -> Tensor:
        """The gradient of a regulariser at what the client at this place has now: (P_t,)."""
        row = self._trained[place].detach().clone().requires_grad_()
        now, before = self.of_trained(row, place), self.of_trained(self._start[place], place)
        (gradient,) = regulariser_gradients(path, now, before, [row])
        return torch.zeros_like(row) if gradient is None else gradient

    def restore_unreached(self) -> None:
        """Put back what no batch has used: torch's optimizers leave alone what has no gradient.

        Not for private clients: there is noise on all that is trained, and whether there was a batch is nobody's to
        know.
        """
        for key in self.layout.columns:
            if self.layout.is_trained(key) and key not in self.rows.reached:
                self.layout.view(self._trained, key).copy_(self.layout.view(self._start, key))

    def lora(self, place: int) -> LoRA:
        """A copy of the adapter of the client at this place as it is now."""
        return self.layout.lora(self.theta[place], self._starts[place])

    def of_trained(self, row: Tensor, place: int) -> LoRA:
        """What lies in a row of trained columns, (P_t,), by the sides and modules of the client at this place."""
        return self.layout.lora(row, self._starts[place].only(self._jobs[place].trains))

    def set_gradient(self, place: int, gradient: LoRA) -> None:
        """Let the client at this place follow this gradient in the next step."""
        self.gradient[place] = self.layout.flat(gradient, LoRA(), self.gradient.dtype)[: self.layout.trained]

    def update(self, place: int, examples: int, loss: float | None) -> Trained:
        """The update and the kept sides of the client at this place."""
        job, taken = self._tasks[place].job, self._taken[place]
        return training.make_update(job, self.lora(place), taken, examples, loss)


def check_starts(model: Model, starts: Sequence[LoRA]) -> None:
    """Raise `StrategyError` for a start that the model cannot take.

    Raises `NotStackableError` for one without a side that the model has: it keeps there what it held before, which may
    differ from client to client.
    """
    for start in starts:
        model.check_fit(start)
        lacking = [side for side in "ABH" if model.modules(side) and not start.side(side)]
        if lacking:
            raise NotStackableError(f"jobs bring no side {lacking[0]} of the adapter, and leave it as the model has it")


def most_rows(layout: Layout, theta: Tensor) -> int:
    """How many rows have memory for their columns of theta, and for their gradients."""
    return max(1, MOST_BYTES // ((layout.size + layout.trained) * theta.element_size()))
