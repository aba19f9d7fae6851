"""Robust aggregation: round any strategy, a few clients that send what they like do not carry the model off.

Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (ICML 2018),
https://arxiv.org/abs/1803.01498 (median, trimmed mean)
Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (NeurIPS 2017),
https://arxiv.org/abs/1703.02757 (Krum, Multi-Krum)
Sun et al., Can You Really Backdoor Federated Learning? (2019), https://arxiv.org/abs/1911.07963 (norm bound)

    median         the middle of the n clients, coordinate by coordinate
    trimmed_mean   the mean but for the ceil(trim n) lowest and as many highest, never past the median
    krum           the update i with the least sum of |x_i - x_j|^2 over its n - f - 2 nearest j;   f = byzantine
    multi_krum     the mean of the n - f updates that Krum likes best
    norm_bound     x + (x_i - x) min(1, bound / |x_i - x|);   x: where the round started

A client's word on how many examples it has is not taken: all weigh the same, but for norm_bound, which leaves the
weights to server.weights. Honest clients with unlike data look like attackers: all rules but norm_bound lose some.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora import LoRA, average, difference, euclidean_norm, map_factors
from fedlora.strategy import HIGHEST_RANK, Client, Job, Sender, Strategy, declare, next_state, shared_start


@dataclass(frozen=True)
class Robust(Strategy[Any]):
    """Wraps a strategy so that a few dishonest clients do not carry the model off."""

    inner: Strategy[Any]
    rule: Literal["median", "trimmed_mean", "krum", "multi_krum", "norm_bound"]
    trim: float = 0.1
    byzantine: int = 1
    bound: float = 0.0

    def __post_init__(self) -> None:
        if reason := self._refusal():
            raise StrategyError(f"{self.rule} cannot go round {type(self.inner).__name__}: {reason}")
        if not 0 <= self.trim < 0.5 or self.byzantine < 0 or (self.rule == "norm_bound" and not self.bound > 0):
            raise StrategyError(
                f"{self.rule} with trim = {self.trim}, byzantine = {self.byzantine}, bound = {self.bound}: "
                "trim must lie in [0, 0.5), byzantine be 0 or more, and norm_bound needs a bound above 0"
            )
        alike = self.rule != "norm_bound" or self.inner.own_weights
        declare(self, self.inner, exact=False, sums_only=False, own_weights=alike, continues=False)

    def init(self, lora: LoRA) -> Any:
        state = self.inner.init(lora)
        if self.inner.client_init(state, HIGHEST_RANK).resumes:
            raise StrategyError(
                f"{self.rule} cannot go round {type(self.inner).__name__}: its clients go on from factors of their "
                "own, so that their updates have no coordinates in common; take fedavg"
            )
        return state

    def client_init(self, state: Any, client: Client) -> Job:
        return self.inner.client_init(state, client)

    def aggregate(
        self, state: Any, updates: Sequence[LoRA], weights: Sequence[float], senders: Sequence[Sender] = ()
    ) -> Any:
        if self.rule == "norm_bound":
            x = shared_start(self.inner.client_init(state, HIGHEST_RANK))
            return next_state(self.inner, state, [bounded(u, x, self.bound) for u in updates], weights, senders)
        if self.rule in ("krum", "multi_krum"):
            likes = 1 if self.rule == "krum" else len(updates) - self.byzantine
            best = ranking(updates, self.byzantine)[:likes]
            whose = [senders[i] for i in best] if senders else []
            return next_state(self.inner, state, [updates[i] for i in best], [1.0] * len(best), whose)
        return self.inner.aggregate(state, [centre(updates, self._left_out(len(updates)))], [1.0])

    def adapter(self, state: Any) -> LoRA:
        return self.inner.adapter(state)

    def notes(self, state: Any) -> Mapping[str, float]:
        return self.inner.notes(state)

    def _left_out(self, n: int) -> int:
        """How many values the median and the trimmed mean leave out at either end."""
        middle = (n - 1) // 2
        if self.rule == "median":
            return middle
        return min(middle, ceil(self.trim * n - 1e-9))  # 0.07 * 100 is above 7

    def _refusal(self) -> str:
        if self.inner.exchanges > 1:
            return "of two passes each would leave out other clients, and the two belong together; take fedavg"
        if self.rule != "norm_bound" and self.inner.mixed_ranks:
            return "clients of mixed ranks have no coordinates in common; take norm_bound, or fedavg"
        if self.rule in ("median", "trimmed_mean") and not self.inner.sums_only:
            return "it needs the product of every single client, which a mean has not; take krum, or fedavg"
        return ""


def centre(updates: Sequence[LoRA], k: int) -> LoRA:
    """Mean without the k lowest and the k highest of every coordinate; what is not a number counts as highest."""

    def trimmed_mean(*matrices: Tensor) -> Tensor:
        ordered = torch.stack(matrices).double().sort(dim=0).values[k : len(matrices) - k]
        return ordered.mean(0).to(torch.promote_types(matrices[0].dtype, torch.float32))

    return map_factors(trimmed_mean, *updates)


def ranking(updates: Sequence[LoRA], f: int) -> list[int]:
    """The updates from Krum's best to its worst. Raises `StrategyError` below 2 f + 3 of them."""
    n = len(updates)
    if n < 2 * f + 3:
        raise StrategyError(
            f"Krum needs 2 * {f} + 3 = {2 * f + 3} updates to outvote byzantine = {f} clients, and {n} came: "
            "ask a larger cohort, or set a smaller byzantine"
        )
    d2 = torch.zeros(n, n, dtype=torch.float64)
    for s, m, _ in updates[0].matrices():
        x = torch.stack([u.side(s)[m].double().flatten() for u in updates])  # (n, numel)
        # of differences, not of x x^T, which has no digits left where updates differ by little
        d2 += torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    near = d2.nan_to_num(nan=inf, posinf=inf).fill_diagonal_(0).sort(dim=1).values  # (n, n), 0 to itself first
    scores, rows = near[:, : n - f - 1].sum(1).tolist(), near.tolist()
    return sorted(range(n), key=lambda i: (scores[i], rows[i]))  # each other's nearest tie on scores where f = 0, n = 3


def bounded(update: LoRA, start: LoRA, bound: float) -> LoRA:
    """The update with its step from the start no longer than `bound`; no step where it is not finite."""
    if any(t.shape != start.side(s)[m].shape for s, m, t in update.matrices()):
        raise StrategyError(
            "norm_bound measures a step from where the round started, and an update has another shape than that: "
            "give all clients lora.rank, or take a strategy without mixed ranks, as fedavg"
        )
    x = map_factors(lambda _, there: there, update, start)  # the start of what the update has
    size = euclidean_norm(difference(update, x))
    if not isfinite(size):
        return x
    c = min(1.0, bound / size) if size else 1.0
    return average([update, x], [c, 1 - c])
