"""Randomness is counted, not consumed: every draw has a seed of its own, so any engine and a resumed run draw alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch


def derive(seed: int | str, *purpose: str | int) -> int:
    """A seed for one purpose: `derive(seed, "batches", client, round)`; 63 bits."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(sha256(text.encode()).digest()[:8]) >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generators seeded inside, as they were outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
