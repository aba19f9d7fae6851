"""Quick dropout drops as often as it is asked to, keeps the mean, and lets gradients through where it kept."""

import pytest
import torch
from torch import nn

from fedlora.kernels.dropout import dropout, quick_dropout
from fedlora.seeds import seeded

N = 2**18


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_share_that_is_dropped_and_the_mean_are_as_asked(p: float, dtype: torch.dtype) -> None:
    with seeded(0):
        y = dropout(torch.ones(N, dtype=dtype), p)
    deviation = (p * (1 - p) / N) ** 0.5
    assert abs(float((y == 0).double().mean()) - p) < 5 * deviation + 1 / 2**17
    assert abs(float(y.double().mean()) - 1) < 5 * deviation / (1 - p) + (4e-3 if dtype == torch.bfloat16 else 0)


def test_neighbouring_elements_are_dropped_independently() -> None:
    with seeded(0):
        kept = dropout(torch.ones(N), 0.5).view(-1, 8) > 0
    correlation = torch.corrcoef(kept.T.double()) - torch.eye(8, dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / (N / 8) ** 0.5


def test_gradients_are_those_of_the_elements_that_were_kept() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.equal(y.detach())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_of_nought_and_one_are_exact(p: float) -> None:
    assert dropout(torch.ones(1000), p).equal(torch.full((1000,), 1 - p))


def test_draws_are_those_of_the_seed() -> None:
    draws = []
    for _ in range(2):
        with seeded(3):
            draws.append(dropout(torch.ones(1000), 0.5))
    assert draws[0].equal(draws[1])


def test_a_network_drops_quickly_within_the_block_alone() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    x = torch.ones(64, 4)
    with seeded(1):
        plain = net[0](x)
    with quick_dropout(net), seeded(1):
        assert net[0](x).equal(dropout_with_seed(x))
        net.eval()
        assert net[0](x).equal(x)
    net.train()
    with seeded(1):
        assert net[0](x).equal(plain)


def dropout_with_seed(x: torch.Tensor) -> torch.Tensor:
    with seeded(1):
        return dropout(x, 0.5)
