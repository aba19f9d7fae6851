"""Seeds for every purpose: no draw depends on draws before it, so any engine and a resumed run draw alike."""

from collections.abc import Callable, Iterator
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


def rewinding(device: torch.device) -> Callable[[], None]:
    """A function that puts torch's generators, of the CPU and of this device, back to where they are now."""
    cpu = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(cpu)
        if own is not None:
            torch.cuda.set_rng_state(own, device)

    return rewind
