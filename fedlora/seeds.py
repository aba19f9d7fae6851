"""Seeds for every purpose: no draw depends on draws before it, so any engine and a resumed run draw alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

import torch


def derive(seed: int | str, *purpose: str | int) -> int:
    """The seed of 63 bits for one purpose: `derive(seed, "batches", client, round)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(sha256(text.encode()).digest()[:8]) >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators within the context, and restore them after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
