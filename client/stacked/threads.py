"""The micro-batches of a pass on several threads of a CPU, each with a network of its own over the same weights.

An operation that torch itself splits over threads ends when the last of them has done its part, and a training step has
thousands of operations of a millisecond. A micro-batch is the larger part: two threads with one micro-batch each took
2.1 s for a step of 50 clients (MiniLM, 8 rows each), where one micro-batch on two threads took 3.0 (medians of four on
two cores of a Xeon, by the clock; 3.7 and 4.4 s of the processor).

Dropout of a micro-batch is drawn from a generator of its own, whose words the global one draws in the order of the
micro-batches; what they come to is added up in that order too. So the numbers do not depend on which thread is first.
A network that draws from the global generator besides is computed on one thread, as torch splits it.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from itertools import chain
from typing import Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedlora.client.stacked.layout import Key
from fedlora.client.stacked.row_pass import RowPass
from fedlora.encoding.encoder import Example
from fedlora.kernels.dropout import drawing_from
from fedlora.kernels.losses import share_refusal
from fedlora.models.model import Model
from fedlora.twister import next_generator

MOST = 4  # micro-batches at once: the Python of each runs while no other's does
T = TypeVar("T")
Places = Sequence[int]  # of the examples of a micro-batch
_draws_besides: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()  # of models that have been seen to draw or not to


class RowPasses:
    """A context in which a model computes every row with its own client's columns of theta, on as many threads as pay.

    It is used as a `RowPass`; `each` is what runs on threads.
    """

    def __init__(self, make: Callable[[Model], RowPass], model: Model, *, alone: bool = False) -> None:
        """`make` makes the pass of a model; `alone` has one micro-batch computed at a time, whatever the threads."""
        self._model, self._make, self._rows = model, make, make(model)
        self._threads = 1 if alone else at_once(model)
        self._twins: list[Model] = []
        self._free = deque([self._rows])
        self._every = [self._rows]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._twins = [twin(self._model) for _ in range(self._threads - 1)]  # of the network as it is outside
            stack.enter_context(self._rows)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def reached(self) -> set[Key]:
        """What had a gradient in any batch so far."""
        return set(chain.from_iterable(rows.reached for rows in self._every))

    def train(self, sides: str) -> None:
        """Have gradients found of these sides alone, of those that are trained; others' are zero."""
        for rows in self._every:
            rows.sides = sides

    def gradients(
        self, theta: Tensor, owner: Tensor, weights: Tensor, examples: Sequence[Example]
    ) -> tuple[Tensor, Tensor]:
        """What `RowPass.gradients` returns, of a pass that no other thread is using."""
        rows = self._free.pop()
        try:
            return rows.gradients(theta, owner, weights, examples)
        finally:
            self._free.append(rows)

    def each(self, compute: Callable[[Places], T], batches: Iterable[Places]) -> Iterator[T]:
        """Yield what is computed of each micro-batch, in their order; `compute` may run on any thread."""
        if self._model.device.type != "cpu":
            yield from map(compute, batches)
            return
        waiting = deque(batches)
        if waiting and self._model not in _draws_besides:
            yield self._first(compute, waiting.popleft())
        if len(waiting) > 1 and self._threads > 1 and not _draws_besides[self._model]:
            yield from self._at_once(compute, waiting)
        else:
            yield from (_with(next_generator(), compute, places) for places in waiting)

    def _first(self, compute: Callable[[Places], T], places: Places) -> T:
        """What is computed of a model's first micro-batch; note whether torch's global generator has gone on."""
        generator, before = next_generator(), torch.get_rng_state()
        computed = _with(generator, compute, places)
        _draws_besides[self._model] = not torch.equal(torch.get_rng_state(), before)
        return computed

    def _at_once(self, compute: Callable[[Places], T], batches: Iterable[Places]) -> Iterator[T]:
        pool, running = self._pool(), deque[Future[T]]()
        try:
            for places in batches:
                running.append(pool.submit(copy_context().run, _with, next_generator(), compute, places))
                if len(running) > 2 * self._threads:  # what is computed waits in memory
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            wait(running)  # an error leaves no thread in a network that is about to be put back

    def _pool(self) -> ThreadPoolExecutor:
        """The threads, each with a pass; made when they are first needed."""
        if not hasattr(self, "_executor"):
            share_refusal(self._model.net, [twin.net for twin in self._twins])
            for model in self._twins:
                rows = self._make(model)
                rows.sides = self._rows.sides
                self._every.append(self._stack.enter_context(rows))
            self._free = deque(self._every)
            all_threads = torch.get_num_threads()
            own = partial(torch.set_num_threads, all_threads // self._threads)
            self._executor = ThreadPoolExecutor(self._threads, "micro-batches", own)
            self._stack.enter_context(self._executor)
        return self._executor


def twin(model: Model) -> Model:
    """A model with modules of its own, and the weights of this one."""
    shared = chain(model.net.parameters(), model.net.buffers(), (model.encoder, model.objective, model.schema))
    return copy.deepcopy(model, {id(part): part for part in shared})


def at_once(model: Model) -> int:
    """How many micro-batches of a model are computed at once; torch's own number of threads bounds it.

    One on a GPU, and where products in another precision are bound to the modules of one network.
    """
    if model.device.type != "cpu" or model.products is not nullcontext or _draws_besides.get(model):
        return 1
    return min(MOST, torch.get_num_threads())


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _with(generator: torch.Generator, compute: Callable[[Places], T], places: Places) -> T:
    with drawing_from(generator):
        return compute(places)
