"""The filter on gradients, against what it is as a matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.models.optimizer import smooth, smooth_gradients
from fedlora.strategies.la_lora import FILTER

SIXTEENTHS = torch.tensor(FILTER, dtype=torch.float64) * 16


def matrix(size: int) -> Tensor:
    """The filter on so many features, (size, size)."""
    return smooth(torch.eye(size, dtype=torch.float64), FILTER, 1)


def test_a_unit_vector_becomes_the_taps_and_at_an_edge_they_are_mirrored() -> None:
    spread = 16 * matrix(9)
    assert_close(spread[4], torch.tensor([0, 0, 1, 4, 6, 4, 1, 0, 0], dtype=torch.float64))
    assert_close(spread[0, :3], torch.tensor([10, 5, 1], dtype=torch.float64))


@given(size=st.integers(1, 40))
def test_it_is_symmetric_and_positive_and_leaves_a_constant_as_it_is(size: int) -> None:
    """So a direction of descent stays one. Its eigenvalues are cos^4 (pi k / 2 d)."""
    f = matrix(size)
    assert_close(f, f.T)
    assert_close(f.sum(1), torch.ones(size, dtype=torch.float64))
    wanted = torch.cos(torch.pi * torch.arange(size, dtype=torch.float64) / (2 * size)) ** 4
    assert_close(torch.linalg.eigvalsh(f), wanted.flip(0), atol=1e-12, rtol=0)


def test_white_noise_keeps_a_quarter_of_its_variance_and_more_of_it_at_an_edge() -> None:
    variance = matrix(24).square().sum(1)
    assert variance[[0, 1, 12]].tolist() == pytest.approx([126 / 256, 78 / 256, 70 / 256])


def test_a_smooth_signal_stays_and_the_same_without_its_order_is_taken_for_noise() -> None:
    signal = torch.sin(torch.arange(768, dtype=torch.float64) / 30)
    permuted = signal[torch.randperm(768, generator=torch.Generator().manual_seed(0))]
    assert smooth(signal, FILTER, 0).square().sum() / signal.square().sum() > 0.99
    assert smooth(permuted, FILTER, 0).square().sum() / signal.square().sum() < 0.35


def test_gradients_are_filtered_along_the_features_of_their_side() -> None:
    """Of A along d_in, of B along d_out; of a head, and of a vector in the place of A, not at all."""
    g = torch.Generator().manual_seed(1)
    shapes = {"A": (2, 9), "B": (7, 2), "R": (2, 2), "H": (3, 8)}
    sides = {side: [nn.Parameter(torch.zeros(shape))] for side, shape in shapes.items()}
    sides["A"].append(nn.Parameter(torch.zeros(9)))
    sides["B"].append(nn.Parameter(torch.zeros(7)))
    for parameters in sides.values():
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
    before = {side: [p.grad.clone() for p in parameters if p.grad is not None] for side, parameters in sides.items()}
    smooth_gradients(sides, FILTER)
    d_in, d_out = (matrix(n).float() for n in (9, 7))
    wanted = {
        "A": [before["A"][0] @ d_in, before["A"][1]],
        "B": [d_out @ g for g in before["B"]],
        "R": before["R"],
        "H": before["H"],
    }
    assert_close({side: [p.grad for p in parameters] for side, parameters in sides.items()}, wanted)
