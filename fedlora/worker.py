"""A client's side of a round: a Job and some examples in, an Update out. Knows no algorithm."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, cos, isfinite, pi

import torch
from torch import Tensor, nn

from .base import seeded
from .data import Rows
from .encode import Encoder, Example, length
from .errors import ClientFailed
from .lora import SIDES, LoRA, join, scale, wide
from .metrics import Metrics
from .model import Model
from .seeds import derive
from .strategy import Client, Job, Training, Update


@dataclass(frozen=True, eq=False)
class Site:
    """One client's examples, encoded when they are first needed."""

    encoder: Encoder
    train_rows: Rows
    heldout_rows: Rows = ()

    @cached_property
    def train(self) -> list[Example]:
        return self.encoder(self.train_rows)

    @cached_property
    def heldout(self) -> list[Example]:
        return self.encoder(self.heldout_rows)

    def client(self, id: int, rank: int) -> Client:
        """What the server is told of this client."""
        return Client(id, len(self.train_rows), rank)


def train(model: Model, job: Job, client: int, examples: Sequence[Example], kept: LoRA) -> tuple[Update, LoRA]:
    """Train what the job names; return what it shares, and what stays with the client.

    Of a job that resumes, A and B of the update hold the change of the product: [A'; A] and [B', -B].
    Raises `ClientFailed` where the loss is no longer a number.
    """
    taken = _wear(model, job, kept)
    sides = {side: model.trains(side) for side in job.trains}
    model.trains(job.trains)
    with seeded(derive(job.seed, "dropout", client, job.round)):
        loss = _descend(model, sides, job, client, examples)
    lora = model.read()
    shared = lora.only(job.shares)
    change = join(shared.only("AB"), taken) if taken else LoRA()
    return Update(change.over(shared), len(examples), loss), lora.only(_keeps(job))


def evaluate(model: Model, job: Job, examples: Sequence[Example], kept: LoRA) -> Metrics:
    """The model that this client would use: what it keeps over what the job brings."""
    _wear(model, job, kept)
    return model.metrics(examples)


def _wear(model: Model, job: Job, kept: LoRA) -> LoRA:
    """Put the client where it starts; of a job that resumes, return what this takes off the weights, -B A."""
    start = kept.only(_keeps(job)).over(job.start)
    moved = job.resumes and any(bool(b.any()) for b in start.B.values())
    taken = scale(start.only("AB"), -1) if moved else LoRA()
    model.write(start, (*job.offset, taken) if taken else job.offset, job.gain)
    return taken


def _keeps(job: Job) -> str:
    """The sides that stay with the client."""
    own = set(job.trains) - set(job.shares) | set("AB" if job.resumes else "")
    return "".join(s for s in SIDES if s in own)


def _descend(
    model: Model, sides: Mapping[str, list[nn.Parameter]], job: Job, client: int, examples: Sequence[Example]
) -> float:
    """All of a round's optimizer steps; the mean loss over the targets seen."""
    training, parameters = job.training, [p for side in sides.values() for p in side]
    start = [p.detach().clone() for p in parameters]
    optimizer = _optimizer(training, model, sides)
    optimizer.zero_grad()  # a client that failed in the middle of a step left a gradient behind
    model.net.train()
    total, targets = 0.0, 0
    steps = count_steps(training, len(examples))
    chunks = _chunks(len(examples), training, job, client)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor(training, (job.round + (step + 1) / steps) / job.rounds)
        chunk = [examples[i] for i in next(chunks)]
        if job.example_clip:
            loss, n = _clipped_gradients(model, parameters, chunk, job.example_clip)
        else:
            loss, n = _gradient(model, chunk, training.batch_size)
        if not isfinite(loss):
            raise ClientFailed(
                f"client {client}: the loss is {loss} at step {step + 1} of round {job.round + 1}; "
                f"a train.lr below {training.lr:g} may help"
            )
        _attract(parameters, start, training.prox)
        if training.clip and not job.example_clip:
            nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        optimizer.zero_grad()
        total, targets = total + loss, targets + n
    return total / targets


def _gradient(model: Model, chunk: list[Example], batch_size: int) -> tuple[float, int]:
    """Leave in `.grad` the gradient of the mean loss over the whole chunk's targets; return loss sum and targets."""
    n = max(model.targets(chunk), 1)
    total = 0.0
    chunk = sorted(chunk, key=length)  # like lengths together: the sum is the same, with less padding
    for i in range(0, len(chunk), batch_size):
        loss: Tensor = model.loss(model.encoder.collate(chunk[i : i + batch_size]))
        (loss / n).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, n


def _clipped_gradients(
    model: Model, parameters: Sequence[nn.Parameter], chunk: list[Example], largest: float
) -> tuple[float, int]:
    """Leave in `.grad` the mean over examples of their gradients, none longer than `largest` over all parameters.

    An example's loss is the mean over its own targets: divided by all the chunk's, one example's gradient would depend
    on the lengths of the others. Returns loss sum and targets of the chunk.
    """
    means = [torch.zeros_like(wide(p)) for p in parameters]
    total, targets = 0.0, 0
    for example in chunk:  # one at a time: the reference that faster ways answer to
        n = max(model.targets([example]), 1)
        loss: Tensor = model.loss(model.encoder.collate([example]))
        grads = [wide(g) for g in torch.autograd.grad(loss / n, parameters, materialize_grads=True)]
        norm = torch.stack([g.norm() for g in grads]).norm()
        for mean, g in zip(means, grads, strict=True):
            mean.add_(g * (largest / norm.clamp(min=largest)) / len(chunk))
        total, targets = total + float(loss.detach()), targets + n
    for p, mean in zip(parameters, means, strict=True):
        p.grad = mean.to(p.dtype)
    return total, targets


def _attract(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's mu/2 times the squared distance to the start."""
    for p, p0 in zip(parameters, start, strict=True) if mu else ():
        if p.grad is not None:
            p.grad.add_(p.detach() - p0, alpha=mu)


def _optimizer(training: Training, model: Model, sides: Mapping[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
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


def _chunks(n: int, training: Training, job: Job, client: int) -> Iterator[list[int]]:
    """The examples of one optimizer step after another, every epoch in an order of its own."""
    size, epoch = training.batch_size * training.accumulate, 0
    while True:
        generator = torch.Generator().manual_seed(derive(job.seed, "batches", client, job.round, epoch))
        order = torch.randperm(n, generator=generator).tolist()
        for i in range(0, n, size):
            yield order[i : i + size]
        epoch += 1
