"""Small random adapters, as if trained or as PEFT makes them."""

import torch

from fedlora.lora import LoRA

SHAPES = {"q": (8, 6), "v": (5, 6), "out": (6, 8)}  # module -> (d_out, d_in), none of them square


def factors(seed: int, rank: int = 4, dtype: torch.dtype = torch.float64) -> LoRA:
    """A random adapter with a head, as if trained."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return LoRA(
        A={m: draw(rank, d_in) for m, (_, d_in) in SHAPES.items()},
        B={m: draw(d_out, rank) for m, (d_out, _) in SHAPES.items()},
        H={"head.weight": draw(3, 8), "head.bias": draw(3)},
    )


def fresh(rank: int = 4) -> LoRA:
    """An adapter as PEFT makes it: A random, B zero."""
    made = factors(0, rank)
    return LoRA(made.A, {m: torch.zeros_like(b) for m, b in made.B.items()}, made.H)
