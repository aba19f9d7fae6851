"""The numbers that a model is judged by."""

import math

import pytest
import scipy.stats
import torch

from fedlora.metrics import Metrics, macro_f1, spread
from fedlora.models.objectives import moments


def test_perplexity_is_per_token_not_per_batch() -> None:
    total = Metrics(1, 10, 10 * 2.0, 4) + Metrics(1, 30, 30 * 1.0, 20)
    assert total.values() == pytest.approx({"loss": 1.25, "perplexity": math.exp(1.25), "token_accuracy": 0.6})


def test_macro_f1_is_the_mean_over_classes() -> None:
    confusion = torch.tensor([[8, 2], [4, 6]])  # F1: 16/22 and 12/18
    assert macro_f1(confusion) == pytest.approx((16 / 22 + 12 / 18) / 2)


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    assert macro_f1(torch.tensor([[5, 0, 0], [0, 5, 0], [0, 0, 0]])) == 1.0


def test_nothing_evaluated_is_zero_not_a_crash() -> None:
    assert macro_f1(torch.zeros(2, 2)) == 0.0
    assert spread({0: Metrics(0, 0, 0.0, 0)}) == {}


def test_the_worst_classifier_has_the_lowest_accuracy() -> None:
    clients = {i: Metrics(10, 10, 1.0, right, torch.eye(2)) for i, right in enumerate((9, 3, 6))}
    got = spread(clients)
    assert (got["metric"], got["worst_client"]) == ("accuracy", 1)
    assert got["mean"] == pytest.approx(0.6) and got["worst"] == pytest.approx(0.3)


def test_the_worst_language_model_has_the_highest_perplexity() -> None:
    clients = {i: Metrics(1, 10, loss, 1) for i, loss in enumerate((10.0, 30.0))}
    assert spread(clients)["worst_client"] == 1


def regression(pairs: torch.Tensor) -> Metrics:
    loss = float((pairs[:, 0] - pairs[:, 1]).square().sum())
    return Metrics(len(pairs), len(pairs), loss, 0, moments=moments(pairs), pairs=pairs)


def test_correlations_are_those_of_scipy_over_all_batches_together() -> None:
    numbers = torch.randint(0, 5, (40, 2), generator=torch.Generator().manual_seed(3)).double() + 100  # with ties
    got = (regression(numbers[:7]) + regression(numbers[7:])).values()
    y, p = numbers.T.numpy()
    wanted = {"pearson": scipy.stats.pearsonr(y, p)[0], "spearman": scipy.stats.spearmanr(y, p)[0]}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted)
    assert got["mse"] == got["loss"] == pytest.approx(float(((y - p) ** 2).mean()))


def test_numbers_that_do_not_vary_have_a_correlation_of_zero() -> None:
    got = regression(torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]])).values()
    assert (got["pearson"], got["spearman"]) == (0.0, 0.0)


def test_micro_f1_counts_labels_alike_and_macro_f1_their_kinds() -> None:
    counts = torch.tensor([[8, 2, 0], [1, 0, 3], [0, 0, 0]])  # F1: 16/18 and 2/5; the third never occurs
    got = Metrics(10, 10, 5.0, 4, label_counts=counts).values()
    wanted = {"loss": 0.5, "micro_f1": 18 / 23, "macro_f1": (16 / 18 + 2 / 5) / 2, "subset_accuracy": 0.4}
    assert got == pytest.approx(wanted)
