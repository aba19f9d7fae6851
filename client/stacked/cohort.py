"""The training of many clients in one pass, step by step together: what `training.train` does for one.

In every step the rows of all clients lie in one heap, which is cut into micro-batches of rows of like lengths; the
gradients of its rows are added up for each client. Clients with fewer steps finish earlier.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from fedlora.client import training
from fedlora.client.stacked.adapters import Adapters
from fedlora.client.stacked.layout import core_forms
from fedlora.client.stacked.optimizers import column
from fedlora.client.training import Outcome, TrainingTask
from fedlora.encoding.encoder import Example
from fedlora.errors import ClientFailed, TrainingDiverged
from fedlora.jobs import trained_letters
from fedlora.kernels.example_batches import micro_batches
from fedlora.models.model import Model
from fedlora.models.optimizer import count_steps
from fedlora.seeds import derive, seeded


def group(model: Model, task: TrainingTask) -> Hashable:
    """What tasks must have alike to be trained in one pass; ranks, rates, steps, batches and noise may differ."""
    job = task.job
    offset = tuple(map(id, job.offset))
    clips: Hashable = bool(job.example_clip)
    if job.privacy:
        clips = job.privacy.clip, job.privacy.head_share, task.mechanism.clip
    course = job.turns, job.smoothing, job.training.optimizer, job.training.loss
    sides = "".join(sorted(trained_letters(job)))
    return sides, course, offset, core_forms(job.start), clips


def train(model: Model, tasks: Sequence[TrainingTask]) -> list[Outcome]:
    """The update and the kept sides of every task, or its client's error; all tasks are of one group.

    Raises `NotStackableError` where the model's rows cannot be told apart: nothing is done then.
    """
    return with_data(tasks, partial(_train, model))


def with_data(
    tasks: Sequence[TrainingTask], train: Callable[[Sequence[TrainingTask]], Sequence[Outcome]]
) -> list[Outcome]:
    """The results of those tasks that there are data for, and the errors of the others."""
    results: list[Outcome | None] = [_empty(task) for task in tasks]
    trained = iter(train([task for task, failed in zip(tasks, results, strict=True) if failed is None]))
    return [next(trained) if failed is None else failed for failed in results]


def _empty(task: TrainingTask) -> ClientFailed | None:
    try:
        task.refuse_empty()
    except ClientFailed as e:
        return e
    return None


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one client brings to one step."""

    place: int  # of the client among the tasks
    examples: list[Example]
    targets: int  # at least 1


def _train(model: Model, tasks: Sequence[TrainingTask]) -> list[Outcome]:
    if not tasks:
        return []
    cohort, job = Cohort(model, tasks), tasks[0].job
    draws = seeded(derive(job.seed, "dropout of many", tasks[0].client, job.round))
    with cohort.adapters.training(model, draws):
        for step in range(max(cohort.adapters.steps)):
            cohort.step(step)
    return cohort.results()


class Cohort:
    """Clients in the middle of their training, and what each brings to the next steps."""

    def __init__(self, model: Model, tasks: Sequence[TrainingTask]) -> None:
        self._model, self._tasks = model, tasks
        jobs = [task.job for task in tasks]
        steps = [count_steps(job.training, len(t.examples)) for job, t in zip(jobs, tasks, strict=True)]
        self.adapters = Adapters(model, tasks, steps)
        self._theta = self.adapters.theta
        self._chunks = [self._chunks_of(i) for i in range(len(tasks))]
        self._clips_examples = bool(jobs[0].example_clip)
        self._example_clip = column([job.example_clip for job in jobs], self._theta)
        self._clip = column([0.0 if job.example_clip else job.training.clip for job in jobs], self._theta)
        self._losses: list[Tensor] = []  # of each step, (clients,): summed over the targets of a client's chunk
        self._targets = [0] * len(tasks)

    def _chunks_of(self, place: int) -> Iterator[Chunk]:
        task = self._tasks[place]
        for chosen in training.chunks(len(task.examples), task.job.training, task.job, task.client):
            examples = [task.examples[i] for i in chosen]
            yield Chunk(place, examples, max(self._model.targets(examples), 1))

    def step(self, step: int) -> None:
        """Do the same step of all clients that have one left."""
        self.adapters.turn_to(step)
        chunks = [next(self._chunks[place]) for place in self.adapters.places(step)]
        self._losses.append(self._add_gradients(chunks))
        for chunk in chunks:
            self._targets[chunk.place] += chunk.targets
        self.adapters.step(step, self._clip)

    def _add_gradients(self, chunks: Sequence[Chunk]) -> Tensor:
        """Leave each client's gradient in that of `adapters`; return the sums of the losses, (clients,).

        It is that of the mean loss over the targets of a client's chunk; or, where examples are clipped, the mean of
        the clipped gradients of each example's own mean loss.
        """
        examples = list(chain.from_iterable(chunk.examples for chunk in chunks))
        theta, gradient = self._theta, self.adapters.gradient
        owners = _repeated([chunk.place for chunk in chunks], chunks).to(theta.device)
        weights = self._weights(chunks, examples).to(theta)
        shares = _repeated([1 / len(chunk.examples) for chunk in chunks], chunks).to(theta)
        losses = theta.new_zeros(len(theta))
        gradient.zero_()

        def compute(places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
            chosen = torch.tensor(places, device=theta.device)
            owner = owners[chosen]
            g, loss = self.adapters.rows.gradients(theta, owner, weights[chosen], [examples[i] for i in places])
            if self._clips_examples:
                g.mul_(_clipping(g, self._example_clip[owner]) * shares[chosen, None])
            return owner, g, loss

        batches = micro_batches(self._model, examples, self.adapters.most_rows)
        for owner, g, loss in self.adapters.rows.each(compute, batches):
            gradient.index_add_(0, owner, g)
            losses.index_add_(0, owner, loss.to(losses.dtype))
        return losses

    def _weights(self, chunks: Sequence[Chunk], examples: Sequence[Example]) -> Tensor:
        """What each example's loss is multiplied by: (examples,)."""
        if self._clips_examples:
            return torch.tensor([1 / max(self._model.targets([e]), 1) for e in examples], dtype=torch.float64)
        return _repeated([1 / chunk.targets for chunk in chunks], chunks)

    def results(self) -> list[Outcome]:
        """What became of every task, once all steps are done."""
        self.adapters.restore_unreached()
        losses = torch.stack(self._losses).cpu()  # (steps, clients)
        return [self._result(i, losses[: self.adapters.steps[i], i]) for i in range(len(self._tasks))]

    def _result(self, place: int, losses: Tensor) -> Outcome:
        task = self._tasks[place]
        wrong = (~losses.isfinite()).nonzero()[:, 0].tolist()
        if wrong:
            return TrainingDiverged(training.why_diverged(self._model, task.job, wrong[0], float(losses[wrong[0]])))
        return self.adapters.update(place, len(task.examples), float(losses.sum()) / self._targets[place])


def _repeated(values: Sequence[float], chunks: Sequence[Chunk]) -> Tensor:
    """One value a chunk, for each of its examples: (examples,)."""
    counts = torch.tensor([len(chunk.examples) for chunk in chunks])
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float64).repeat_interleave(counts)


def _clipping(gradient: Tensor, largest: Tensor) -> Tensor:
    """The factors with which no row of a gradient is longer than `largest`: (rows, 1) both."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return largest / torch.maximum(norms, largest)
