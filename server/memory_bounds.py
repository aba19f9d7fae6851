"""A bound on the memory that a reply may take, checked before the memory is taken.

Flower receives all chunks of a message, however many, and sends equal chunks once, so that a few bytes can unpack to
gigabytes. It has no setting for either, so this file, and no other, replaces two of its functions.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from threading import Lock
from typing import Any

from flwr.app import Array
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid

from fedlora.errors import WireError

BESIDES = 16 * 2**20  # bytes of a message that are no numbers: its head, and names
_most: ContextVar[float] = ContextVar("_most", default=inf)  # of this thread: a simulation's clients have others
_inflate = Array.inflate


@contextmanager
def bounded(most: float) -> Iterator[None]:
    """Inside a `with`, a reply of more than `most` bytes of numbers raises `WireError`, in this thread alone."""
    before = _most.set(most)
    try:
        yield
    finally:
        _most.reset(before)


def _bounded_inflate(object_content: bytes, children: Mapping[str, Any] | None = None) -> Array:
    """Flower's own `Array.inflate`, after a check of the array's length, which is known to within a chunk."""
    chunks = json.loads(object_content.partition(b"\0")[2])["arraychunk_ids"]
    largest = max((len(chunk.data) for chunk in (children or {}).values()), default=0)
    if (len(chunks) - 1) * largest > _most.get():
        raise WireError(
            f"a message unpacks to {len(chunks) * largest / 1e6:.1f} MB of numbers; at most "
            f"{_most.get() / 1e6:.1f} MB were asked for"
        )
    return _inflate(object_content, dict(children or {}))


def _bounded_pull(object_ids: Sequence[str], pull_object_fn: Callable[[str], bytes], **more: Any) -> dict[str, bytes]:
    """Flower's own `pull_objects`, stopped as soon as too many bytes have come."""
    most, lock, came = _most.get(), Lock(), 0

    def pull(object_id: str) -> bytes:
        nonlocal came
        content = pull_object_fn(object_id)
        with lock:
            came += len(content)
        if came > most + BESIDES:
            raise WireError(f"a message brings more than {came / 1e6:.1f} MB; {most / 1e6:.1f} MB were asked for")
        return content

    return pull_objects(list(object_ids), pull, **more)


Array.inflate = staticmethod(_bounded_inflate)  # type: ignore[method-assign]
http_grid.pull_objects = _bounded_pull  # type: ignore[attr-defined]
