"""A generator whose whole state the global one draws."""

import numpy as np
import pytest
import torch

from fedlora import twister
from fedlora.seeds import seeded


def test_all_words_of_its_state_are_those_that_the_global_generator_draws() -> None:
    with seeded(3):
        words = torch.randint(2**32, (twister.SIZE,)).numpy()
    with seeded(3):
        found = torch.randint(2**20, (2000,), generator=twister.next_generator()).numpy()
    expected = np.random.RandomState()
    expected.set_state(("MT19937", words.astype(np.uint32), 624, 0, 0.0))
    assert np.array_equal(found, expected.randint(0, 2**32, 2000, dtype=np.uint32) % 2**20)


def test_one_after_another_draws_other_numbers() -> None:
    with seeded(3):
        one, other = (torch.rand(8, generator=twister.next_generator()) for _ in range(2))
    assert not torch.equal(one, other)


def test_a_torch_that_keeps_its_state_otherwise_gives_generators_that_differ_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(twister, "_BYTES", 0)
    with seeded(3):
        one, other = (torch.rand(8, generator=twister.next_generator()) for _ in range(2))
    assert not torch.equal(one, other)
