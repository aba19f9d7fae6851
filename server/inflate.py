"""What an answer may unpack to: Flower carries equal chunks once, so that few bytes can ask for gigabytes of memory."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from typing import Any

from flwr.app import Array

from fedlora.errors import WireError

_most: ContextVar[float] = ContextVar("_most", default=inf)  # of this thread: a simulation's clients have others
_inflate = Array.inflate


@contextmanager
def bounded(most: float) -> Iterator[None]:
    """Within it, this thread is made no array of more than `most` bytes and a chunk: `WireError` is raised before."""
    before = _most.set(most)
    try:
        yield
    finally:
        _most.reset(before)


def _bounded(object_content: bytes, children: Mapping[str, Any] | None = None) -> Array:
    """Flower's own `Array.inflate`, once the array's length has been looked at."""
    chunks = json.loads(object_content.partition(b"\0")[2])["arraychunk_ids"]
    largest = max((len(chunk.data) for chunk in (children or {}).values()), default=0)
    if (len(chunks) - 1) * largest > _most.get():
        raise WireError(
            f"a message unpacks to {len(chunks) * largest / 1e6:.1f} MB of numbers; at most "
            f"{_most.get() / 1e6:.1f} MB were asked for"
        )
    return _inflate(object_content, dict(children or {}))


Array.inflate = staticmethod(_bounded)  # type: ignore[method-assign, assignment]
