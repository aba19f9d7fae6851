"""Random numbers that nobody else can draw: the keystream of AES-256 in counter mode under a key of the system's.

For an experiment the key may be made from a seed instead; then anybody who knows the seed can remove the noise again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from math import pi, prod
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from fedlora import twister
from fedlora.errors import PrivacyError
from fedlora.seeds import seeded


class SecureRandom:
    """One stream of random numbers; every number is drawn once."""

    def __init__(self, key: bytes) -> None:
        """`key` has 32 bytes; every key has a stream of its own."""
        self._key = key
        self._stream: Any = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def secret(cls) -> "SecureRandom":
        """Return a stream under a fresh key from the operating system, which is written nowhere."""
        return cls(os.urandom(32))

    @classmethod
    def seeded(cls, seed: int) -> "SecureRandom":
        """Return the stream that belongs to this seed: for experiments, as it protects nobody."""
        return cls(sha256(f"fedlora noise {seed}".encode()).digest())

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Return n numbers in (0, 1), odd multiples of 2^-53; 0 and 1 are excluded, so that logarithms are finite."""
        words = np.frombuffer(self._stream.update(bytes(8 * n)), dtype="<u8")
        return np.asarray(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers in float64, by Box and Muller's transform; none is beyond 8.6."""
        n = prod(shape)
        u, v = torch.from_numpy(self.uniform(n + n % 2)).view(2, -1)  # torch's logarithm is three times numpy's pace
        radius, angle = u.log_().mul_(-2).sqrt_(), v.mul_(2 * pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:n].view(shape)

    def poisson_sample(self, n: int, rate: float) -> list[int]:
        """Return which of n are in a Poisson sample: each is by itself, with this probability."""
        return [int(i) for i in np.flatnonzero(self.uniform(n) < rate)]

    def seed(self) -> int:
        """Return 63 bits, to seed another generator."""
        return int.from_bytes(self._stream.update(bytes(8))) >> 1

    def key(self) -> bytes:
        """Return 32 bytes, to key another stream.

        They are made of this stream's key and of its next 8 bytes, which are all that it loses: experiments with a seed
        go on drawing the numbers that they drew when it lost these to a seed.
        """
        return sha256(self._key + self._stream.update(bytes(8))).digest()

    def words(self, n: int) -> NDArray[np.int64]:
        """Return n whole numbers of 32 bits."""
        return np.frombuffer(self._stream.update(bytes(4 * n)), dtype="<u4").astype(np.int64)

    def one_of(self, n: int) -> int:
        """Return a whole number below n, each with the same probability."""
        return int(self.uniform(1)[0] * n)


@contextmanager
def secret_draws(key: bytes) -> Iterator[None]:
    """Within the block torch's generators, from which dropout draws, are those of this key; they are restored after it.

    A seed would not do: of its bits torch's generator on the CPU takes the low 32, which can be tried out. So all the
    words of its state come from the key's stream. On a GPU it is a cipher of a counter, keyed with a seed of 63 bits.
    Raises `PrivacyError` for a torch whose generator is another.
    """
    random = SecureRandom(key)
    with seeded(random.seed()):
        torch.set_rng_state(_filled(torch.get_rng_state(), random))
        yield


def _filled(state: Tensor, random: SecureRandom) -> Tensor:
    """The state of the generator that torch has just seeded, with words of this stream in place of its own."""
    if not twister.is_known(state, torch.initial_seed()):
        raise PrivacyError(
            f"torch {torch.__version__} keeps the state of its random numbers otherwise than is known here, so that "
            "dropout would be no secret; install another version of torch"
        )
    return twister.filled(state, torch.from_numpy(random.words(twister.SIZE)))
