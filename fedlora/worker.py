"""A client's side of a round: a Job and some examples in, an Update out. Knows no algorithm."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import ceil, cos, isfinite, pi

import torch
from torch import Tensor, nn

from .base import seeded
from .data import Rows
from .encode import Encoder, Example, length
from .errors import ClientFailed
from .lora import SIDES, LoRA
from .metrics import Metrics
from .model import Model
from .seeds import derive
from .strategy import Client, Job, Training, Update


class Site:
    """One client's examples, encoded when they are first needed."""

    def __init__(self, encoder: Encoder, train: Rows, heldout: Rows) -> None:
        self._encoder, self._train, self._heldout = encoder, train, heldout

    @cached_property
    def train(self) -> list[Example]:
        return self._encoder(self._train)

    @cached_property
    def heldout(self) -> list[Example]:
        return self._encoder(self._heldout)

    def client(self, id: int, rank: int) -> Client:
        """What the server is told of this client."""
        return Client(id, len(self._train), rank)


def train(model: Model, job: Job, client: int, examples: Sequence[Example], kept: LoRA) -> tuple[Update, LoRA]:
    """Train what the job names; return what it shares, and what stays with the client.

    Raises `ClientFailed` where the loss is no longer a number.
    """
    keeps = "".join(s for s in SIDES if s in job.trains and s not in job.shares)
    model.write(kept.only(keeps).over(job.start), job.offset)
    parameters = model.trains(job.trains)
    with seeded(derive(job.seed, "dropout", client, job.round)):
        loss = _descend(model, parameters, job, client, examples)
    lora = model.read()
    return Update(lora.only(job.shares), len(examples), loss), lora.only(keeps)


def evaluate(model: Model, job: Job, examples: Sequence[Example], kept: LoRA) -> Metrics:
    """The model that this client would use: what it keeps over what the job brings."""
    keeps = "".join(s for s in SIDES if s in job.trains and s not in job.shares)
    model.write(kept.only(keeps).over(job.start), job.offset)
    return model.metrics(examples)


def _descend(model: Model, parameters: list[nn.Parameter], job: Job, client: int, examples: Sequence[Example]) -> float:
    """All of a round's optimizer steps; the mean loss over the targets seen."""
    training = job.training
    start = [p.detach().clone() for p in parameters]
    optimizer = _optimizer(training, model, parameters)
    optimizer.zero_grad()  # a client that failed in the middle of a step left a gradient behind
    model.net.train()
    total, targets = 0.0, 0
    steps = count_steps(training, len(examples))
    chunks = _chunks(len(examples), training, job, client)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor(training, (job.round + (step + 1) / steps) / job.rounds)
        chunk = [examples[i] for i in next(chunks)]
        loss, n = _gradient(model, chunk, training.batch_size)
        if not isfinite(loss):
            raise ClientFailed(
                f"client {client}: the loss is {loss} at step {step + 1} of round {job.round + 1}; "
                f"a train.lr below {training.lr:g} may help"
            )
        if training.prox:
            for p, p0 in zip(parameters, start, strict=True):
                if p.grad is not None:
                    p.grad.add_(p.detach() - p0, alpha=training.prox)
        if training.clip:
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


def _optimizer(training: Training, model: Model, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adapter and head as two groups, each with the learning rate it has where the schedule's factor is one."""
    heads = {id(p) for p in model.heads.values()}
    adapter = {"params": [p for p in parameters if id(p) not in heads], "full_lr": training.lr}
    head = {"params": [p for p in parameters if id(p) in heads], "full_lr": training.head_lr or training.lr}
    groups = [group for group in (adapter, head) if group["params"]]
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=training.lr, weight_decay=decay)


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
