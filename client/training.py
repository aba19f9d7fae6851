"""Local training: a job and a client's examples in, an update out; no algorithm is known here.

A job names what is trained and shared, so that every strategy trains by the same code.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedlora.encoding.encoder import Example, Records
from fedlora.errors import ClientFailed, ReasonCode, TrainingDiverged
from fedlora.jobs import Job, Update, kept_part, shared_part, start_with, trained_letters, trains_scales
from fedlora.kernels.evaluation import measure
from fedlora.lora import LoRA, at_least_float32, join, scale
from fedlora.metrics import Metrics
from fedlora.models import optimizer as optimize
from fedlora.models.added_gradients import added_gradients
from fedlora.models.model import Model
from fedlora.models.probe import not_finite
from fedlora.privacy import dpsgd
from fedlora.privacy.dpsgd import STANDARD, Mechanism
from fedlora.sections import Training
from fedlora.seeds import derive, seeded

Trained = tuple[Update, LoRA]  # the update, and the sides that stay with the client
Outcome = Trained | Exception  # of a task, trained by whatever engine
Task = TypeVar("Task")
Done = TypeVar("Done")


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingTask:
    """The training that a job asks of one client: all of the client that it needs, and no model."""

    client: int
    job: Job
    kept: LoRA  # the sides that the client kept before this round
    examples: Sequence[Example] = ()  # of a job without DP-SGD
    records: Records = ()  # of a private job
    mechanism: Mechanism = STANDARD  # of a private job
    fewest_told: int = 1  # records of a private job, and of those drawn, of which a loss may be told

    def refuse_empty(self) -> None:
        """Raise `ClientFailed` where there is nothing to train on."""
        if self.job.privacy and not self.records:
            raise ClientFailed(f"client {self.client} has no records to train on", code=ReasonCode.DATA)
        if not self.job.privacy and not self.examples:
            raise ClientFailed(
                f"client {self.client} has no examples to train on: no row of its data has a token to learn within "
                "model.max_length",
                code=ReasonCode.DATA,
            )


def perform(model: Model, task: TrainingTask) -> Trained:
    """Train one task on the model; return and raise as `train` and `train_privately` do."""
    if task.job.privacy:
        return train_privately(
            model, task.job, task.client, task.records, task.kept, task.mechanism, fewest_told=task.fewest_told
        )
    return train(model, task.job, task.client, task.examples, task.kept)


def outcome_of(model: Model, task: TrainingTask) -> Outcome:
    """What comes of a task that is trained by itself, or whatever it raises: its client says what becomes of that."""
    try:
        return perform(model, task)
    except Exception as e:  # whatever it is: the cause of a private job's failure may not be told
        return e


def begin(steps: Generator[Task, Outcome, Done]) -> Task | Done:
    """Go on to what is to be trained; what is done without any training is returned at once."""
    try:
        return next(steps)
    except StopIteration as done:
        result: Done = done.value
        return result


def end(steps: Generator[Any, Outcome, Done], outcome: Outcome) -> Done:
    """Go on from the training, with what came of it, to what is done. Raises what the steps raise."""
    try:
        steps.send(outcome)
    except StopIteration as done:
        result: Done = done.value
        return result
    raise AssertionError("a job is trained once")


def trained(outcome: Outcome) -> Trained:
    """The update and the kept sides; raises what the training raised."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def train(model: Model, job: Job, client: int, examples: Sequence[Example], kept: LoRA) -> Trained:
    """Train what the job names; return the update, and the sides that stay with the client.

    The update of a job that resumes holds the change of the product in its A and B: [A'; A] and [B', -B].
    Raises `TrainingDiverged` where the loss is no longer a number, `ClientFailed` where there are no examples.
    """
    TrainingTask(client=client, job=job, kept=kept, examples=examples).refuse_empty()
    taken = load_start(model, job, kept)
    with model.learning(job.training), seeded(derive(job.seed, "dropout", client, job.round)):
        loss = run_steps(model, _sides(model, job), job, client, examples)
    return make_update(job, model.get_adapter(), taken, len(examples), loss)


def train_privately(
    model: Model,
    job: Job,
    client: int,
    records: Records,
    kept: LoRA,
    mechanism: Mechanism = STANDARD,
    *,
    fewest_told: int = 1,
) -> Trained:
    """Train what the job names by DP-SGD, on the job's terms; return as `train` does.

    No noise hides a loss: it is in the update only where the job asks for it, as with `dp.metrics`.
    Raises `PrivacyError` for a model that cannot be trained so, `ClientFailed` where there are no records.
    """
    TrainingTask(client=client, job=job, kept=kept, records=records).refuse_empty()
    taken = load_start(model, job, kept)
    with model.learning(job.training, private=True):
        losses = dpsgd.train(model, _sides(model, job), job, client, records, mechanism)
    loss = dpsgd.told_loss(losses, records=len(records), fewest=fewest_told)
    return make_update(job, model.get_adapter(), taken, len(records), loss)


@dataclass(frozen=True, eq=False)
class EvaluationTask:
    """The model that a client would use, with the sides it keeps and a job's for all others, and what it holds out."""

    job: Job
    examples: Sequence[Example]
    kept: LoRA


def evaluate(model: Model, job: Job, examples: Sequence[Example], kept: LoRA) -> Metrics:
    """Measure the model that this client would use: the sides it keeps, and the job's for all others."""
    load_start(model, job, kept)
    return measure(model, examples)


def load_start(model: Model, job: Job, kept: LoRA) -> LoRA:
    """Load the client's start into the model; for a job that resumes, return what is subtracted for it, -B A."""
    start, taken = start_of(job, kept)
    offset = (*job.offset, taken) if taken else job.offset
    model.set_adapter(start, offset, job.gain, scales=trains_scales(job))
    return taken


def start_of(job: Job, kept: LoRA) -> tuple[LoRA, LoRA]:
    """The adapter that a client starts a job from, and what is subtracted beside it: -B A of a job that resumes."""
    start = start_with(job, kept)
    moved = job.resumes and any(bool(b.any()) for b in start.B.values())
    return start, scale(start.only("AB"), -1) if moved else LoRA()


def _sides(model: Model, job: Job) -> dict[str, list[nn.Parameter]]:
    """The parameters that the job trains, by side; only these get gradients from here on."""
    letters = trained_letters(job)
    sides = {side: model.set_trainable(side) for side in letters}
    model.set_trainable(letters)
    return sides


def make_update(job: Job, lora: LoRA, taken: LoRA, examples: int, loss: float | None) -> Trained:
    """The update of a trained adapter, with what the job shares, and what the client keeps.

    Of a job with `right` it keeps the factors until the round is over. `taken` is what was subtracted beside the
    adapter's start (see `start_of`). A loss is told only where the job asks.
    """
    shared = shared_part(job, lora)
    change = join(shared.only("AB"), taken) if taken else LoRA()
    stays = lora.only("AB" if job.right else "").over(kept_part(job, lora))
    return Update(change.over(shared), examples, loss if job.metrics else None), stays


def run_steps(
    model: Model, sides: Mapping[str, list[nn.Parameter]], job: Job, client: int, examples: Sequence[Example]
) -> float:
    """Run all optimizer steps of a round; return the mean loss over the targets seen."""
    training = job.training
    parameters = [p for side in sides.values() for p in side]
    added = added_gradients(model, job)
    optimizer = optimize.make(training, model, sides)
    optimizer.zero_grad()  # a client that failed in the middle of a step left a gradient behind
    model.begin_training()
    total, targets = 0.0, 0
    steps = optimize.count_steps(training, len(examples))
    places = chunks(len(examples), training, job, client)
    for step, now in optimize.in_turn(model, sides, job, steps):
        optimize.set_rates(optimizer, training, job, step=step, steps=steps)
        chunk = [examples[i] for i in next(places)]
        loss, n = _step_gradient(model, [*chain.from_iterable(now.values())], chunk, job)
        if not isfinite(loss):
            raise TrainingDiverged(why_diverged(model, job, step, loss))
        added.add()
        if training.clip and not job.example_clip:  # else every example's gradient is clipped already
            nn.utils.clip_grad_norm_(parameters, training.clip)
        optimize.smooth_gradients(now, job.smoothing)
        optimizer.step()
        optimizer.zero_grad()
        total += loss
        targets += n
    return total / targets


def why_diverged(model: Model, job: Job, step: int, loss: float) -> str:
    """What to say of a loss that is no number; before any step of a sound start, the base model is the reason."""
    if job.round == step == 0 and all(bool(t.isfinite().all()) for _, _, t in job.start.matrices()):
        return f"the loss is {loss} before any step: {not_finite(model.net, model.dtype)}"
    return (
        f"the loss is {loss} at step {step + 1} of round {job.round + 1}; a train.lr below {job.training.lr:g} may help"
    )


def _step_gradient(
    model: Model, parameters: Sequence[nn.Parameter], chunk: list[Example], job: Job
) -> tuple[float, int]:
    """Leave the gradient of one step in `.grad`; return the loss summed over the chunk's targets, and their count."""
    if job.example_clip:
        return _clipped_gradients(model, parameters, chunk, job.example_clip)
    return _gradient(model, chunk, job.training.batch_size)


def _gradient(model: Model, chunk: list[Example], batch_size: int) -> tuple[float, int]:
    """Leave the gradient of the mean loss over all targets of the chunk in `.grad`; return as `_step_gradient` does."""
    n = max(model.targets(chunk), 1)
    total = 0.0
    for batch in model.encoder.batches(chunk, batch_size):
        loss: Tensor = model.loss(model.encoder.collate(batch))
        (loss / n).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, n


def _clipped_gradients(
    model: Model, parameters: Sequence[nn.Parameter], chunk: list[Example], largest: float
) -> tuple[float, int]:
    """Leave the mean of the examples' clipped gradients in `.grad`; return as `_step_gradient` does.

    No example's gradient is longer than `largest` over all parameters. An example's loss is the mean over its own
    targets: divided by those of the whole chunk, its gradient would depend on the lengths of the other examples.
    """
    means = [torch.zeros_like(at_least_float32(p)) for p in parameters]
    total, targets = 0.0, 0
    for example in chunk:  # one at a time: the reference that faster ways are held to
        n = max(model.targets([example]), 1)
        loss: Tensor = model.loss(model.encoder.collate([example]))
        for mean, g in zip(means, _clipped(loss / n, parameters, largest), strict=True):
            mean.add_(g / len(chunk))
        total += float(loss.detach())
        targets += n
    for p, mean in zip(parameters, means, strict=True):
        p.grad = mean.to(p.dtype)
    return total, targets


def _clipped(loss: Tensor, parameters: Sequence[nn.Parameter], largest: float) -> list[Tensor]:
    """The gradient of a loss over these parameters, as one vector no longer than `largest`."""
    gradients = [at_least_float32(g) for g in torch.autograd.grad(loss, parameters, materialize_grads=True)]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g * (largest / norm.clamp(min=largest)) for g in gradients]


def chunks(n: int, training: Training, job: Job, client: int) -> Iterator[list[int]]:
    """Yield the places of the examples of one optimizer step after another, in another order every epoch."""
    size = training.batch_size * training.accumulate
    for epoch in count():
        generator = torch.Generator().manual_seed(derive(job.seed, "batches", client, job.round, epoch))
        order = torch.randperm(n, generator=generator).tolist()
        for i in range(0, n, size):
            yield order[i : i + size]
