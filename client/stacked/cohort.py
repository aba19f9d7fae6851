"""The training of many clients in one pass, step by step together: what `training.train` does for one.

In every step the rows of all clients lie in one heap, which is cut into micro-batches of rows of like lengths; the
gradients of its rows are added up for each client. Clients with fewer steps finish earlier.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch import Tensor

from fedlora.client import training
from fedlora.client.stacked import optimizers
from fedlora.client.stacked.layout import layout_of
from fedlora.client.stacked.optimizers import column
from fedlora.client.stacked.row_pass import RowPass
from fedlora.client.training import Trained, TrainingTask
from fedlora.encoding.encoder import Example, length
from fedlora.errors import ClientFailed, TrainingDiverged
from fedlora.kernels.microbatches import Bounds, plan
from fedlora.models.model import Model
from fedlora.models.optimizer import count_steps
from fedlora.seeds import derive, seeded

Result = Trained | ClientFailed
BOUNDS = Bounds(tokens=1024, overhead=64)
PATCH = 16  # pixels of the side of a patch of an image


def group(model: Model, task: TrainingTask) -> Hashable:
    """What tasks must have alike to be trained in one pass; ranks, rates, steps and batches may differ."""
    job = task.job
    offset = tuple(map(id, job.offset))
    clips = bool(job.example_clip)
    return "".join(sorted(job.trains)), offset, tuple(job.start.R), clips, job.training.optimizer


def train(model: Model, tasks: Sequence[TrainingTask]) -> list[Result]:
    """The update and the kept sides of every task, or its client's error; all tasks are of one group.

    Raises `NotStackableError` where the model's rows cannot be told apart: nothing is done then.
    """
    results: list[Result | None] = [_empty(task) for task in tasks]
    trained = iter(_train(model, [task for task, failed in zip(tasks, results, strict=True) if failed is None]))
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


def _train(model: Model, tasks: Sequence[TrainingTask]) -> list[Result]:
    if not tasks:
        return []
    cohort = Cohort(model, tasks)
    model.offset.set(tasks[0].job.offset)
    model.set_trainable("")
    model.begin_training()
    job = tasks[0].job
    with seeded(derive(job.seed, "dropout of many", job.round)), cohort.rows:
        for step in range(max(cohort.steps)):
            cohort.step(step)
    return cohort.results()


class Cohort:
    """Clients in the middle of their training: theta (clients, P), and all that an optimizer keeps of it."""

    def __init__(self, model: Model, tasks: Sequence[TrainingTask]) -> None:
        self._model, self._tasks, self._jobs = model, tasks, [task.job for task in tasks]
        self._starts, self._taken = zip(*(training.start_of(t.job, t.kept) for t in tasks), strict=True)
        self.layout = layout_of(self._starts, self._jobs[0].trains, self._taken)
        dtype = model.adapter_dtype
        rows = [self.layout.flat(*pair, dtype) for pair in zip(self._starts, self._taken, strict=True)]
        self.theta = torch.stack(rows).to(model.device)
        self._trained = self.theta[:, : self.layout.trained]  # the same memory
        self._start = self._trained.clone()
        self._gradient = torch.zeros_like(self._trained)
        self._optimizer = optimizers.make(self.layout, model, self._jobs, dtype)
        self.rows = RowPass(model, self.layout, [job.gain for job in self._jobs])
        self.steps = [count_steps(job.training, len(t.examples)) for job, t in zip(self._jobs, tasks, strict=True)]
        self._chunks = [self._chunks_of(i) for i in range(len(tasks))]
        self._prox = column([job.training.prox for job in self._jobs], self.theta)
        self._clips_examples = bool(self._jobs[0].example_clip)
        self._example_clip = column([job.example_clip for job in self._jobs], self.theta)
        self._clip = column([0.0 if job.example_clip else job.training.clip for job in self._jobs], self.theta)
        self._losses: list[Tensor] = []  # of each step, (clients,): summed over the targets of a client's chunk
        self._targets = [0] * len(tasks)

    def _chunks_of(self, place: int) -> Iterator[Chunk]:
        task = self._tasks[place]
        for chosen in training.chunks(len(task.examples), task.job.training, task.job, task.client):
            examples = [task.examples[i] for i in chosen]
            yield Chunk(place, examples, max(self._model.targets(examples), 1))

    def step(self, step: int) -> None:
        """Do the same step of all clients that have one left."""
        chunks = [next(own) for own, steps in zip(self._chunks, self.steps, strict=True) if step < steps]
        self._losses.append(self._add_gradients(chunks))
        for chunk in chunks:
            self._targets[chunk.place] += chunk.targets
        self._gradient.add_(self._prox * (self._trained - self._start))
        optimizers.clip_norms(self._gradient, self._clip)
        factors = optimizers.lr_factors(self._jobs, self.steps, step)
        places = torch.tensor([chunk.place for chunk in chunks], device=self.theta.device)
        self._optimizer.step(self._trained, self._gradient, column(factors, self.theta), places)

    def _add_gradients(self, chunks: Sequence[Chunk]) -> Tensor:
        """Leave each client's gradient in `_gradient`; return the sums of the losses, (clients,).

        It is that of the mean loss over the targets of a client's chunk; or, where examples are clipped, the mean of
        the clipped gradients of each example's own mean loss.
        """
        examples = list(chain.from_iterable(chunk.examples for chunk in chunks))
        owners = _repeated([chunk.place for chunk in chunks], chunks).to(self.theta.device)
        weights = self._weights(chunks, examples).to(self.theta)
        shares = _repeated([1 / len(chunk.examples) for chunk in chunks], chunks).to(self.theta)
        losses = self.theta.new_zeros(len(self.theta))
        self._gradient.zero_()
        for places in micro_batches(self._model, examples):
            chosen = torch.tensor(places, device=self.theta.device)
            owner = owners[chosen]
            g, loss = self.rows.gradients(self.theta, owner, weights[chosen], [examples[i] for i in places])
            if self._clips_examples:
                g.mul_(_clipping(g, self._example_clip[owner]) * shares[chosen, None])
            self._gradient.index_add_(0, owner, g)
            losses.index_add_(0, owner, loss.to(losses.dtype))
        return losses

    def _weights(self, chunks: Sequence[Chunk], examples: Sequence[Example]) -> Tensor:
        """What each example's loss is multiplied by: (examples,)."""
        if self._clips_examples:
            return torch.tensor([1 / max(self._model.targets([e]), 1) for e in examples], dtype=torch.float64)
        return _repeated([1 / chunk.targets for chunk in chunks], chunks)

    def results(self) -> list[Result]:
        """What became of every task, once all steps are done."""
        losses = torch.stack(self._losses).cpu()  # (steps, clients)
        return [self._result(i, losses[: self.steps[i], i]) for i in range(len(self._tasks))]

    def _result(self, place: int, losses: Tensor) -> Result:
        task, start = self._tasks[place], self._starts[place]
        wrong = (~losses.isfinite()).nonzero()[:, 0].tolist()
        if wrong:
            return TrainingDiverged(training.why_diverged(self._model, task.job, wrong[0], float(losses[wrong[0]])))
        lora = self.layout.lora(self.theta[place], start)
        loss = float(losses.sum()) / self._targets[place]
        return training.make_update(task.job, lora, self._taken[place], len(task.examples), loss)


def _repeated(values: Sequence[float], chunks: Sequence[Chunk]) -> Tensor:
    """One value a chunk, for each of its examples: (examples,)."""
    counts = torch.tensor([len(chunk.examples) for chunk in chunks])
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float64).repeat_interleave(counts)


def _clipping(gradient: Tensor, largest: Tensor) -> Tensor:
    """The factors with which no row of a gradient is longer than `largest`: (rows, 1) both."""
    norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return largest / torch.maximum(norms, largest)


def micro_batches(model: Model, examples: Sequence[Example]) -> list[list[int]]:
    """The places of the examples of each micro-batch: rows of like lengths, or of one where the model needs that."""
    lengths = [tokens(example) for example in examples]
    if not model.encoder.limits.one_length:
        return plan(lengths, BOUNDS)
    inputs = sorted(range(len(examples)), key=lambda i: length(examples[i]))
    alike = [list(own) for _, own in groupby(inputs, key=lambda i: length(examples[i]))]
    planned = [(own, plan([lengths[i] for i in own], BOUNDS)) for own in alike]
    return [[own[i] for i in batch] for own, batches in planned for batch in batches]


def tokens(example: Example) -> int:
    """What an example costs, in tokens: those it reads and those it writes; an image as many as it has patches."""
    if "pixel_values" in example:
        return max(example["pixel_values"][0].numel() // PATCH**2, 1)
    return length(example) + len(example.get("decoder_input_ids", ()))
