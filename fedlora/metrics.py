"""Metrics of a model: sums that add up over batches and clients, and the figures that are read off them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from statistics import fmean, pstdev

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Metrics:
    """Sums over examples; `targets` are the predicted tokens of a language model, or the examples of a classifier."""

    examples: int
    targets: int
    loss: float  # summed over targets, in nats
    correct: int
    confusion: Tensor | None = None  # (classes, classes): true class by predicted class, of a classifier

    def __add__(self, other: "Metrics") -> "Metrics":
        confusion = None
        if self.confusion is not None and other.confusion is not None:
            confusion = self.confusion + other.confusion
        return Metrics(
            examples=self.examples + other.examples,
            targets=self.targets + other.targets,
            loss=self.loss + other.loss,
            correct=self.correct + other.correct,
            confusion=confusion,
        )

    def values(self) -> dict[str, float]:
        """The mean loss; for a language model perplexity and token accuracy, for a classifier accuracy and macro-F1."""
        targets = max(self.targets, 1)
        loss, accuracy = self.loss / targets, self.correct / targets
        if self.confusion is None:
            return {"loss": loss, "perplexity": exp(min(loss, 700.0)), "token_accuracy": accuracy}
        return {"loss": loss, "accuracy": accuracy, "macro_f1": macro_f1(self.confusion)}


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
    return ("accuracy", True) if "accuracy" in values else ("perplexity", False)


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
