"""What a model learns from the scores it gives: tokens, a class, a number, or several labels.

An objective lines scores up with targets, gives each target a loss, and sums up how good a batch was. The loss of one
example is the mean over its own targets, and none of it depends on the other examples of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlora.data.schema import Schema
from fedlora.encoding.encoder import IGNORED, Example
from fedlora.errors import ModelError
from fedlora.metrics import Metrics

Batch = Mapping[str, Tensor]
TIE = 1e-4  # difference of two rewards up to which neither answer is preferred: a base has none, but for rounding
TARGETS = ("labels", "reference")  # of a batch, what is no input of the network


class Objective(Protocol):
    """What a model is to learn."""

    @property
    def rows(self) -> int:
        """The rows that an example has in a batch."""
        ...

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores and targets of a batch, a row for each target: (targets, ...) each."""
        ...

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The loss of every target, (targets,); 0 where it does not count."""
        ...

    def counted(self, targets: Tensor) -> Tensor:
        """Whether each target counts: (targets,)."""
        ...

    def count(self, example: Example) -> int:
        """The count of targets that an example has."""
        ...

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        """The sums of a batch, from all of its scores and targets."""
        ...


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text: each by those before it, or by a decoder that has the shift in its inputs."""

    rows: ClassVar[int] = 1
    shifted: bool  # are a decoder's inputs its targets, moved by one place, so that scores and targets lie together?

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(examples x tokens, vocabulary) and (examples x tokens,), where a target of -100 does not count."""
        if self.shifted:
            return logits.flatten(0, 1), batch["labels"].flatten()
        return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")

    def counted(self, targets: Tensor) -> Tensor:
        return targets != IGNORED

    def count(self, example: Example) -> int:
        labels = example["labels"] if self.shifted else example["labels"][1:]
        return int((labels != IGNORED).sum())

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        counts = self.counted(targets)
        scores, targets = scores[counts], targets[counts]
        loss = F.cross_entropy(scores, targets, reduction="sum")
        return Metrics(examples, len(targets), float(loss), _right(scores.argmax(-1) == targets))


@dataclass(frozen=True)
class OneClass:
    """One of several classes."""

    rows: ClassVar[int] = 1
    classes: int

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(examples, classes) and (examples,)"""
        return logits, batch["labels"]

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets, reduction="none")

    def counted(self, targets: Tensor) -> Tensor:
        return _every(targets)

    def count(self, example: Example) -> int:
        return 1

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        guess = scores.argmax(-1)
        pairs = torch.bincount(targets * self.classes + guess, minlength=self.classes**2)
        confusion = pairs.view(self.classes, self.classes).cpu()
        loss = F.cross_entropy(scores, targets, reduction="sum")
        return Metrics(examples, len(targets), float(loss), _right(guess == targets), confusion)


@dataclass(frozen=True)
class OneNumber:
    """A number, by its squared error."""

    rows: ClassVar[int] = 1

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(examples,) and (examples,)"""
        return logits.squeeze(-1), batch["labels"]

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(scores, targets, reduction="none")

    def counted(self, targets: Tensor) -> Tensor:
        return _every(targets)

    def count(self, example: Example) -> int:
        return 1

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        pairs = torch.stack([targets, scores], dim=1).double().cpu()  # (examples, 2)
        loss = (pairs[:, 0] - pairs[:, 1]).square().sum()
        return Metrics(examples, len(targets), float(loss), 0, moments=moments(pairs), pairs=pairs)


@dataclass(frozen=True)
class SeveralLabels:
    """Any of several labels, each on its own: yes where its score is above zero, which is a probability of a half."""

    rows: ClassVar[int] = 1
    labels: int

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(examples, labels) and (examples, labels) of 0 and 1"""
        return logits, batch["labels"]

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy, the mean over the labels: (examples,)."""
        return F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(1)

    def counted(self, targets: Tensor) -> Tensor:
        return _every(targets)

    def count(self, example: Example) -> int:
        return 1

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        guess, truth = scores > 0, targets > 0
        counts = torch.stack([(guess & truth).sum(0), (guess & ~truth).sum(0), (~guess & truth).sum(0)], dim=1).cpu()
        loss, right = self.losses(scores, targets).sum(), _right((guess == truth).all(1))
        return Metrics(examples, len(targets), float(loss), right, label_counts=counts)


@dataclass(frozen=True)
class DPO:
    """Which of two answers to a prompt is the better one, by Direct Preference Optimization.

    Rafailov et al., Direct Preference Optimization: Your Language Model is Secretly a Reward Model (NeurIPS 2023),
    https://arxiv.org/abs/2305.18290

        r(y) = beta (log p(y | x) - log p_base(y | x)),   loss = -log sigmoid(r(chosen) - r(rejected))

    p is of the whole answer, the sum over its tokens, and p_base of the base without adapter and offset (see
    `Model.with_reference`), in every round alike.
    """

    beta: float
    rows: ClassVar[int] = 2

    def aligned(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rewards of the chosen and of the rejected answers, (examples, 2), and which is better: the first."""
        return self.rewards(answer_log_probabilities(logits, batch["labels"]), batch["reference"])

    def rewards(self, by_row: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the log-probabilities of the answers by the model and by the base, (2 examples,) each."""
        gained = by_row - reference
        rewards = self.beta * torch.stack(gained.chunk(2), dim=1)
        return rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)

    def losses(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets, reduction="none")  # of two, the same as -log sigmoid of the difference

    def counted(self, targets: Tensor) -> Tensor:
        return _every(targets)

    def count(self, example: Example) -> int:
        return 1

    def metrics(self, scores: Tensor, targets: Tensor, *, examples: int) -> Metrics:
        loss, margins = self.losses(scores, targets).sum(), scores[:, 0] - scores[:, 1]
        rewards = torch.cat([scores.sum(0), (margins.abs() <= TIE).sum(0, keepdim=True)]).double().cpu()
        return Metrics(examples, len(targets), float(loss), _right(margins > TIE), rewards=rewards)


def network_inputs(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the network sees of a batch, on its device; pixels in the number type of its weights."""
    seen = {key: value for key, value in batch.items() if key not in TARGETS}
    return {key: v.to(device, dtype if v.is_floating_point() else v.dtype) for key, v in seen.items()}


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The logarithm of each row's probability of the tokens that count: (rows,)."""
    by_token = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return -by_token.sum(1)


def objective(schema: Schema, *, is_encoder_decoder: bool, dpo_beta: float) -> Objective:
    """What a model learns from data of this schema. Raises `ModelError` for preferences and an encoder-decoder."""
    if schema.kind == "preference" and is_encoder_decoder:
        raise ModelError("preferences are learned by causal language models, and this one is an encoder-decoder")
    if schema.kind == "preference":
        return DPO(dpo_beta)
    if not schema.has_head:
        return Tokens(shifted=is_encoder_decoder)
    by_target: Mapping[str, Objective] = {
        "class": OneClass(len(schema.labels)),
        "number": OneNumber(),
        "labels": SeveralLabels(len(schema.labels)),
    }
    return by_target[schema.target]


def moments(pairs: Tensor) -> Tensor:
    """The sums of y, p, y y, p p and y p over pairs (n, 2) of a number y and its prediction p: (5,) in float64."""
    y, p = pairs.double().unbind(1)
    return torch.stack([y.sum(), p.sum(), (y * y).sum(), (p * p).sum(), (y * p).sum()])


def _every(targets: Tensor) -> Tensor:
    """That every target counts: (targets,)."""
    return torch.ones(len(targets), dtype=torch.bool, device=targets.device)


def _right(correct: Tensor) -> int:
    return int(correct.sum())
