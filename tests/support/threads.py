"""Several threads, and micro-batches small enough that a few rows make many of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fedlora.kernels import microbatches


@pytest.fixture
def small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows or three in a micro-batch."""
    monkeypatch.setattr(microbatches, "CPU_TOKENS", 24)
    monkeypatch.setattr(microbatches, "CPU_OVERHEAD", 1)


@contextmanager
def on(count: int) -> Iterator[None]:
    """Within the block torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
