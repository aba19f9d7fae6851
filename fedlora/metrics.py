"""How good a model is: sums that add up over batches and clients, and the numbers that people read off them."""

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
        pair = (self.confusion, other.confusion)
        return Metrics(
            self.examples + other.examples,
            self.targets + other.targets,
            self.loss + other.loss,
            self.correct + other.correct,
            pair[0] + pair[1] if pair[0] is not None and pair[1] is not None else None,
        )

    def values(self) -> dict[str, float]:
        """Loss and, for a language model, perplexity and token accuracy; for a classifier, accuracy and macro-F1."""
        n = max(self.targets, 1)
        loss, share = self.loss / n, self.correct / n
        if self.confusion is None:
            return {"loss": loss, "perplexity": exp(min(loss, 700.0)), "token_accuracy": share}
        return {"loss": loss, "accuracy": share, "macro_f1": macro_f1(self.confusion)}


def macro_f1(confusion: Tensor) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN), over the classes that occur or were predicted."""
    c = confusion.double()
    tp, both = c.diag(), c.sum(0) + c.sum(1)  # both = 2 TP + FP + FN
    seen = both > 0
    return float((2 * tp[seen] / both[seen]).mean()) if bool(torch.any(seen)) else 0.0


def headline(values: Mapping[str, float]) -> tuple[str, bool]:
    """The metric that stands for all, and whether more of it is better."""
    return ("accuracy", True) if "accuracy" in values else ("perplexity", False)


def spread(clients: Mapping[int, Metrics]) -> dict[str, float | int | str]:
    """The headline metric over clients: mean, worst (and whose), and standard deviation, each client counting once."""
    values = {i: m.values() for i, m in clients.items() if m.targets}
    if not values:
        return {}
    names = [headline(v) for v in values.values()]
    name, more = max(names, key=names.count)  # a client that tells other metrics than most is left out
    each = {i: v[name] for i, v in values.items() if name in v}
    worst = (min if more else max)(each, key=lambda i: each[i])
    return {
        "metric": name,
        "mean": fmean(each.values()),
        "worst": each[worst],
        "worst_client": worst,
        "std": pstdev(each.values()),
        "clients": len(each),
    }
