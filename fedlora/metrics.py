"""Metrics of a model: sums that add up over batches and clients, and the figures that are read off them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, sqrt
from statistics import fmean, pstdev

import torch
from torch import Tensor

HEADLINES = {"accuracy": True, "micro_f1": True, "mse": False, "perplexity": False}  # and whether more is better


@dataclass(frozen=True, eq=False)
class Metrics:
    """Sums over examples; `targets` are the predicted tokens of a language model, or else the examples.

    At most one of the tables is there, by what is learned.
    """

    examples: int
    targets: int
    loss: float  # summed over targets: in nats, or of a regression the squared error
    correct: int  # targets that were met; of several labels, examples with all of them right; of a regression 0
    confusion: Tensor | None = None  # (classes, classes): true class by predicted class, of a classifier
    label_counts: Tensor | None = None  # (labels, 3): true positives, false positives and false negatives of each label
    moments: Tensor | None = None  # (5,) of numbers y and predictions p: the sums of y, p, y y, p p and y p
    rewards: Tensor | None = None  # (3,) of preferences: sums of chosen and of rejected rewards, and the count of ties
    pairs: Tensor | None = None  # (targets, 2) the same numbers and predictions, which stay where they were computed
    own: Mapping[str, float] = field(default_factory=dict)  # a figure of the user's own, summed over targets; stays too

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(
            examples=self.examples + other.examples,
            targets=self.targets + other.targets,
            loss=self.loss + other.loss,
            correct=self.correct + other.correct,
            confusion=_sum(self.confusion, other.confusion),
            label_counts=_sum(self.label_counts, other.label_counts),
            moments=_sum(self.moments, other.moments),
            rewards=_sum(self.rewards, other.rewards),
            pairs=_joined(self.pairs, other.pairs),
            own={name: self.own.get(name, 0.0) + other.own.get(name, 0.0) for name in {**self.own, **other.own}},
        )

    def tables(self) -> dict[str, Tensor]:
        """The tables that are there, by the names of their fields, but for the pairs, which stay here."""
        found = {"confusion": self.confusion, "label_counts": self.label_counts, "moments": self.moments}
        found["rewards"] = self.rewards
        return {name: table for name, table in found.items() if table is not None}

    def values(self) -> dict[str, float]:
        """The figures that are read off the sums, by what was learned.

        Always the mean loss. For a language model perplexity and token accuracy; for a classifier accuracy and
        macro-F1; for several labels micro- and macro-F1 and the share of examples with all labels right; for a
        regression the mean squared error, the correlation of Pearson and, where the predictions are at hand, that of
        Spearman; for preferences the share of pairs in which the chosen answer has the higher reward (a tie is
        half of one), and the rewards. Beside them the mean over targets of a figure of the user's own.
        """
        return self._values() | {name: total / max(self.targets, 1) for name, total in self.own.items()}

    def _values(self) -> dict[str, float]:
        targets = max(self.targets, 1)
        loss, accuracy = self.loss / targets, self.correct / targets
        if self.confusion is not None:
            return {"loss": loss, "accuracy": accuracy, "macro_f1": macro_f1(self.confusion)}
        if self.label_counts is not None:
            return {"loss": loss, **_f1_of_labels(self.label_counts), "subset_accuracy": accuracy}
        if self.moments is not None:
            return {"loss": loss, "mse": loss, **_correlations(self.targets, self.moments, self.pairs)}
        if self.rewards is not None:
            chosen, rejected, ties = (self.rewards / targets).tolist()
            rewards = {"chosen_reward": chosen, "rejected_reward": rejected}
            return {"loss": loss, "accuracy": accuracy + ties / 2, "margin": chosen - rejected, **rewards}
        return {"loss": loss, "perplexity": exp(min(loss, 700.0)), "token_accuracy": accuracy}


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two tables; of one alone, that one."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The rows of two tables; of one alone, its own."""
    if one is None or other is None:
        return other if one is None else one
    return torch.cat([one, other])


def _f1_of_labels(counts: Tensor) -> dict[str, float]:
    """Micro- and macro-F1 of (labels, 3) counts; labels that neither occur nor were predicted are left out."""
    true_positives, marginals = counts[:, 0].double(), (2 * counts[:, 0] + counts[:, 1] + counts[:, 2]).double()
    seen = marginals > 0
    if not bool(torch.any(seen)):
        return {"micro_f1": 0.0, "macro_f1": 0.0}
    micro = 2 * true_positives.sum() / marginals.sum()
    return {"micro_f1": float(micro), "macro_f1": float((2 * true_positives[seen] / marginals[seen]).mean())}


def _correlations(n: int, moments: Tensor, pairs: Tensor | None) -> dict[str, float]:
    """The correlations of numbers and predictions: Pearson's, and with the pairs at hand Spearman's."""
    found = {"pearson": pearson(n, moments)}
    if pairs is not None:
        y, p = (_ranks(column) for column in pairs.unbind(1))
        found["spearman"] = pearson(n, torch.stack([y.sum(), p.sum(), (y * y).sum(), (p * p).sum(), (y * p).sum()]))
    return found


def pearson(n: int, moments: Tensor) -> float:
    """The correlation of y and p from the sums of y, p, y y, p p and y p; 0 where one of them is constant."""
    y, p, yy, pp, yp = moments.double().tolist()
    variances = (n * yy - y * y) * (n * pp - p * p)
    if not variances > 1e-18 * (n * yy) * (n * pp):
        return 0.0
    correlation: float = (n * yp - y * p) / sqrt(variances)
    return max(-1.0, min(1.0, correlation))


def _ranks(values: Tensor) -> Tensor:
    """The rank of every value, from 0; equal values share the mean of their ranks."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts + 1) / 2
    return middle[which]


def macro_f1(confusion: Tensor) -> float:
    """The mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that occur or were predicted.

    `confusion` is (classes, classes): true class by predicted class.
    """
    c = confusion.double()
    true_positives = c.diag()
    marginals = c.sum(0) + c.sum(1)  # 2 TP + FP + FN
    seen = marginals > 0
    if not bool(torch.any(seen)):
        return 0.0
    return float((2 * true_positives[seen] / marginals[seen]).mean())


def headline(values: Mapping[str, float]) -> tuple[str, bool]:
    """The name of the metric that is shown for a model, and whether more of it is better."""
    return next((name, better) for name, better in HEADLINES.items() if name in values)


def spread(clients: Mapping[int, Metrics]) -> dict[str, float | int | str]:
    """The headline metric over clients: mean, worst (and whose), and standard deviation, each client counting once.

    Clients without examples are left out; the result is empty where no client is left.
    """
    values = {i: m.values() for i, m in clients.items() if m.targets}
    if not values:
        return {}
    name, more_is_better = _most_common([headline(v) for v in values.values()])
    by_client = {i: v[name] for i, v in values.items() if name in v}  # without those that tell other metrics than most
    worst_of = min if more_is_better else max
    worst = worst_of(by_client, key=lambda i: by_client[i])
    return {
        "metric": name,
        "mean": fmean(by_client.values()),
        "worst": by_client[worst],
        "worst_client": worst,
        "std": pstdev(by_client.values()),
        "clients": len(by_client),
    }


def _most_common(headlines: list[tuple[str, bool]]) -> tuple[str, bool]:
    return max(headlines, key=headlines.count)
