"""An upload that unpacks to more than was asked for is refused before the memory is taken."""

import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.grid import http_grid

from fedlora.errors import WireError
from fedlora.server.memory_bounds import bounded

BOMB = 400 * 2**20


def unpack(array: Array) -> np.ndarray:
    """A message's content, taken apart and put together as Flower does on the way."""
    content = RecordDict({"head": ConfigRecord({"json": "{}"}), "array": ArrayRecord({"vector": array})})
    objects = {id: thing.deflate() for id, thing in get_all_nested_objects(content).items()}
    records = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(records, RecordDict)
    return records.array_records["array"]["vector"].numpy()


def test_equal_chunks_that_travel_once_are_counted_as_often_as_they_are_put_together() -> None:
    bomb = Array("float32", (BOMB // 4,), "numpy.ndarray", bytes(BOMB))
    content, children = bomb.deflate(), dict(bomb.children or {})
    sent = len(content) + sum(len(chunk.deflate()) for chunk in children.values())
    tracemalloc.start()
    with bounded(10**6), pytest.raises(WireError, match=r"unpacks to 4\d\d\.\d MB of numbers; at most 1\.0 MB"):
        Array.inflate(content, children)
    assert sent < BOMB / 10 and tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_flower_makes_no_array_but_by_this_way() -> None:
    with bounded(10**6), pytest.raises(WireError):
        unpack(Array(np.zeros(BOMB // 4, np.float32)))


@pytest.mark.parametrize("n", [0, 1, 1000, 8 * 2**20])
def test_an_array_of_what_was_asked_for_comes_through(n: int) -> None:
    numbers = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    with bounded(numbers.nbytes):
        assert np.array_equal(unpack(Array(numbers)), numbers)
    assert np.array_equal(unpack(Array(np.zeros(n))), np.zeros(n))


def test_of_a_message_no_more_is_brought_in_than_was_asked_for() -> None:
    asked = list[str]()

    def upload(object_id: str) -> bytes:
        asked.append(object_id)
        return bytes(5 * 2**20)

    with bounded(2**20), pytest.raises(WireError, match=r"brings more than \d+\.\d MB; 1\.0 MB were asked for"):
        http_grid.pull_objects([str(n) for n in range(400)], upload)
    assert len(asked) < 20
    assert len(http_grid.pull_objects(["x", "y"], upload)) == 2
