"""The optimizers of many clients take the steps that torch's take."""

import torch
from torch import nn

from fedlora.client.stacked.optimizers import AdamW


def test_a_step_in_float32_is_torchs_to_its_last_digits() -> None:
    """The first steps divide by 1 - 0.999^t, which is to have all of its digits."""
    gradients = 0.5 + torch.rand(3, 2, 1000, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.zeros(2, 1000), nn.Parameter(torch.zeros(2, 1000))
    many = AdamW(torch.full((1, 1000), 1e-3), torch.zeros(2, 1))
    one = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for g in gradients:
        many.step(ours, g, torch.ones(2, 1), torch.arange(2))
        theirs.grad = g.clone()
        one.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=0.0)
