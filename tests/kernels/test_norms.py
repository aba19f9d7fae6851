"""Norms by hand are transformers' own, with their gradients; what is another norm stays as it is."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fedlora.kernels.norms import quick_norms
from fedlora.seeds import seeded

WIDTH = 12


def norm(kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    made: nn.Module = kind(WIDTH).to(dtype).requires_grad_(False)
    with seeded(0):
        made.get_parameter("weight").normal_()
    return made


def numbers(module: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    with seeded(1):
        x, g = torch.randn(3, 5, WIDTH, dtype=dtype, requires_grad=True), torch.randn(3, 5, WIDTH, dtype=dtype)
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out, x, g)]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_transformers_own(kind: Any, dtype: torch.dtype) -> None:
    module = norm(kind, dtype)
    plain = numbers(module, dtype)
    with quick_norms(module):
        assert "forward" in module.__dict__
        quick = numbers(module, dtype)
    assert "forward" not in module.__dict__
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(quick, plain, rtol=limit, atol=limit)


def test_the_gradient_is_that_of_finite_differences() -> None:
    module = norm(LlamaRMSNorm, torch.float64)
    with quick_norms(module), seeded(2):
        assert torch.autograd.gradcheck(module, torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True))


def test_other_norms_and_those_that_are_trained_stay_as_they_are() -> None:
    trained = norm(LlamaRMSNorm).requires_grad_(True)
    for module in (norm(GemmaRMSNorm), norm(Qwen3NextRMSNormGated), trained, nn.LayerNorm(WIDTH).requires_grad_(False)):
        with quick_norms(module):
            assert "forward" not in module.__dict__
