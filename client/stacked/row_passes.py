"""Row passes of a model, one for each thread that computes micro-batches at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from threading import local
from typing import Self, TypeVar

from torch import Tensor

from fedlora.client.stacked.layout import Key
from fedlora.client.stacked.row_pass import RowPass
from fedlora.encoding.encoder import Example
from fedlora.kernels.threads import MicroBatchThreads, Places
from fedlora.models.model import Model

T = TypeVar("T")


class RowPasses:
    """A context in which a model is trained, every row by its own client's columns of theta, on as many threads as pay.

    What `each` calls finds gradients as a `RowPass` does, by the pass of the thread that it is on.
    """

    def __init__(self, make: Callable[[Model], RowPass], model: Model) -> None:
        """`make` makes the pass of a model."""
        self._threads, self._sides = MicroBatchThreads(model, make, draws=True), "ABRH"
        self._own = local()

    def __enter__(self) -> Self:
        self._threads.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.__exit__(*error)

    @property
    def reached(self) -> set[Key]:
        """What had a gradient in any batch so far."""
        return set(chain.from_iterable(rows.reached for rows in self._threads.each_prepared))

    def train(self, sides: str) -> None:
        """Have gradients found of these sides alone, of those that are trained; others' are zero."""
        self._sides = sides

    def gradients(
        self, theta: Tensor, owner: Tensor, weights: Tensor, examples: Sequence[Example]
    ) -> tuple[Tensor, Tensor]:
        """What `RowPass.gradients` returns, by the pass of this thread."""
        rows: RowPass = self._own.rows
        return rows.gradients(theta, owner, weights, examples)

    def each(self, compute: Callable[[Places], T], batches: Iterable[Places]) -> Iterator[T]:
        """Yield what is computed of each micro-batch, in their order; `compute` may be called on any thread."""

        def on_this_thread(rows: RowPass, places: Places) -> T:
            self._own.rows, rows.sides = rows, self._sides
            return compute(places)

        return self._threads.each(on_this_thread, batches)
