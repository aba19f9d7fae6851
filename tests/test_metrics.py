"""The numbers that a model is judged by."""

import math

import pytest
import torch

from fedlora.metrics import Metrics, macro_f1, spread


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
