"""Randomness is counted, not consumed: every draw has a seed of its own, so any engine and a resumed run draw alike."""

from hashlib import sha256


def derive(seed: int | str, *purpose: str | int) -> int:
    """A seed for one purpose: `derive(seed, "batches", client, round)`; 63 bits."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(sha256(text.encode()).digest()[:8]) >> 1
