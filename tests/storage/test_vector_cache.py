"""Vectors that were computed before are found again, by whoever asks, and damaged ones are not."""

import stat
from pathlib import Path

import numpy as np
import pytest

from fedlora.storage.vector_cache import FAILURES, INDEX, VECTORS, VectorCache, trim

VECTOR = np.arange(5, dtype=np.int32)


def of(cache: VectorCache, key: bytes) -> list[int] | None:
    """The numbers under a key."""
    place = cache.find([key]).get(key)
    return cache.numbers[place[0] : sum(place)].tolist() if place else None


def test_what_one_has_added_another_finds_while_both_add_on(tmp_path: Path) -> None:
    one, other = VectorCache(tmp_path / "a"), VectorCache(tmp_path / "a")
    one.add({b"1": VECTOR, b"2": VECTOR[:0]})
    other.add({b"3": VECTOR * 2})
    one.add({b"4": VECTOR * 3})
    for cache in (one, other, VectorCache(tmp_path / "a")):
        assert [of(cache, key) for key in (b"1", b"2", b"3", b"4", b"5")] == [
            [0, 1, 2, 3, 4],
            [],
            [0, 2, 4, 6, 8],
            [0, 3, 6, 9, 12],
            None,
        ]


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    VectorCache(tmp_path / "a").add({b"1": VECTOR})
    modes = [stat.S_IMODE((tmp_path / "a" / name).stat().st_mode) for name in ("", INDEX, VECTORS)]
    assert modes == [0o700, 0o600, 0o600]


def test_a_damaged_vector_is_not_found_and_can_be_added_again(tmp_path: Path) -> None:
    VectorCache(tmp_path).add({b"1": VECTOR, b"2": VECTOR})
    content = bytearray((tmp_path / VECTORS).read_bytes())
    content[4] ^= 1
    (tmp_path / VECTORS).write_bytes(content[:-3])  # and the end is cut off
    cache = VectorCache(tmp_path)
    assert cache.find([b"1", b"2"]) == {}
    cache.add({b"1": VECTOR})
    assert of(cache, b"1") == [0, 1, 2, 3, 4]


def test_a_damaged_index_is_an_error_by_name(tmp_path: Path) -> None:
    VectorCache(tmp_path).add({b"1": VECTOR})
    (tmp_path / INDEX).write_bytes(b"no index at all" * 99)
    with pytest.raises(FAILURES):
        VectorCache(tmp_path)


def test_a_cache_that_is_removed_under_a_process_still_serves_it(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path / "a")
    place = cache.add({b"1": VECTOR})[b"1"]
    trim(tmp_path, most=0)
    assert (tmp_path / "a").exists()  # the newest may be as large as it is
    VectorCache(tmp_path / "b").add({b"1": VECTOR})
    trim(tmp_path, most=0)
    assert not (tmp_path / "a").exists()
    VectorCache(tmp_path / "a").add({b"1": VECTOR * 2})
    assert cache.numbers[place[0] : sum(place)].tolist() == [0, 1, 2, 3, 4]
