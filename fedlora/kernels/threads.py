"""Micro-batches on several threads of a CPU, each computed by a network of its own over the same weights.

An operation that torch itself splits over threads ends when the last of them has done its part, and a training step has
thousands of operations of a millisecond. A micro-batch is the larger part: two threads with one micro-batch each took
1.9 to 2.6 s for a step of 50 clients (MiniLM, 8 rows each), where one micro-batch after another on two threads took 2.6
to 3.6 (in the same minutes, on two cores of a Xeon).

Dropout of a micro-batch is drawn from a generator of its own, whose words the global one draws in the order of the
micro-batches, and what they come to is handed over in that order: no number depends on which thread is first. A network
that draws from the global generator besides is computed on one thread, whose operations torch splits.
"""

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Generic, Self, TypeVar
from weakref import WeakKeyDictionary

import torch

from fedlora.models.model import Model
from fedlora.models.own_objective import OwnObjective
from fedlora.twister import next_generator

from .dropout import drawing_from
from .losses import share_refusal

MOST = 4  # micro-batches at once: while the Python of one runs, that of the others waits
A = TypeVar("A")
P = TypeVar("P")
T = TypeVar("T")
log = logging.getLogger("fedlora")
Places = Sequence[int]  # of the examples of a micro-batch
_draws_besides: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()  # of models that have trained a micro-batch


def at_once(model: Model, *, draws: bool = False) -> int:
    """How many micro-batches of a model are computed at once, where it `draws` dropout or not.

    It is one on a GPU, where products in another precision or of quantised weights are bound to the modules of one
    network, and where a user's own function, which may not bear two calls at once, judges what a model says.
    """
    is_bound = model.products is not nullcontext or isinstance(model.objective, OwnObjective) or is_quantized(model)
    if model.device.type != "cpu" or is_bound or (draws and draws_besides(model)):
        return 1
    return min(MOST, torch.get_num_threads())


def is_quantized(model: Model) -> bool:
    """Has the base fewer bits than its numbers say?"""
    return bool(getattr(model.net.get_base_model(), "is_quantized", False))


def draws_besides(model: Model) -> bool:
    """Has this model been seen to draw from torch's global generator while it was trained?"""
    return _draws_besides.get(model, False)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on the thread that calls it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(compute: Callable[[A], T], items: Sequence[A]) -> Iterator[T]:
    """Yield what is computed of each item, in their order, on as many threads as torch has."""
    count = min(torch.get_num_threads(), len(items))
    if count <= 1:
        yield from map(compute, items)
        return
    with _pool(count) as pool:
        yield from pool.map(compute, items)


@contextmanager
def _pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, among which torch's own are shared out.

    What a thread is given torch takes for the number of every thread that begins later: it is set back in the end.
    """
    every = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "micro-batches", partial(torch.set_num_threads, every // count)) as pool:
            yield pool
    finally:
        torch.set_num_threads(every)


def twin(model: Model) -> Model:
    """A model with modules of its own, and all else of this one, its weights among it."""
    shared = {id(t): t for t in chain(model.net.parameters(), model.net.buffers())}
    other = copy.copy(model)
    other.net, other.adapted = copy.deepcopy((model.net, model.adapted), shared)
    return other


def _twins(model: Model, count: int) -> list[Model]:
    """So many twins; none of a network that cannot be copied, as one that holds a lock or an open file."""
    try:
        return [twin(model) for _ in range(count)]
    except (TypeError, RuntimeError) as e:  # of copy, and of torch for a tensor that was computed
        log.info("one micro-batch is computed at a time: the network cannot be copied: %s", e)
        return []


class MicroBatchThreads(Generic[P]):
    """A context in which micro-batches are computed at once, as many as pay."""

    def __init__(
        self, model: Model, prepared: Callable[[Model], AbstractContextManager[P]], *, draws: bool = False
    ) -> None:
        """`prepared` is a context in which a model, this one or a twin, can be computed; `draws`: with dropout."""
        self._model, self._prepared, self._draws = model, prepared, draws
        self.each_prepared: list[P] = []  # so far: of the model itself, and of its twins

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # made of the network as it is outside of the context
            self._twins = _twins(self._model, at_once(self._model, draws=self._draws) - 1)
            self.each_prepared = [stack.enter_context(self._prepared(self._model))]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def each(self, compute: Callable[[P, Places], T], batches: Iterable[Places]) -> Iterator[T]:
        """Yield what is computed of each micro-batch, in their order; `compute` is called on any thread."""
        waiting = deque(batches)
        if waiting and self._draws and self._model not in _draws_besides:
            yield self._first(compute, waiting.popleft())
        if len(waiting) > 1 and self._twins and not (self._draws and draws_besides(self._model)):
            yield from self._at_once(compute, waiting)
        else:
            yield from (self._with(self._generator(), compute, self.each_prepared[0], places) for places in waiting)

    def _generator(self) -> AbstractContextManager[None]:
        """A context with a generator for the dropout of the next micro-batch; a GPU has its own."""
        return drawing_from(next_generator()) if self._draws and self._model.device.type == "cpu" else nullcontext()

    def _first(self, compute: Callable[[P, Places], T], places: Places) -> T:
        """What is computed of a model's first micro-batch; note whether torch's global generator has gone on."""
        generator, before = self._generator(), torch.get_rng_state()
        computed = self._with(generator, compute, self.each_prepared[0], places)
        _draws_besides[self._model] = not torch.equal(torch.get_rng_state(), before)
        return computed

    def _at_once(self, compute: Callable[[P, Places], T], batches: Iterable[Places]) -> Iterator[T]:
        self._begin()
        running = deque[Future[T]]()
        try:
            for places in batches:
                work = partial(self._with_a_free_one, self._generator(), compute, places)
                running.append(self._pool.submit(copy_context().run, work))
                if len(running) > 2 * len(self.each_prepared):  # what is computed waits in memory
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            wait(running)  # an error leaves no thread in a network that is about to be put back

    def _begin(self) -> None:
        """Make the threads, and prepare a twin for each but one."""
        if len(self.each_prepared) > len(self._twins):
            return
        share_refusal(self._model.net, [twin.net for twin in self._twins])
        self.each_prepared += [self._stack.enter_context(self._prepared(twin)) for twin in self._twins]
        self._free = SimpleQueue[P]()
        for prepared in self.each_prepared:
            self._free.put(prepared)
        self._pool = self._stack.enter_context(_pool(len(self.each_prepared)))

    def _with_a_free_one(
        self, generator: AbstractContextManager[None], compute: Callable[[P, Places], T], places: Places
    ) -> T:
        prepared = self._free.get()
        try:
            return self._with(generator, compute, prepared, places)
        finally:
            self._free.put(prepared)

    @staticmethod
    def _with(
        generator: AbstractContextManager[None], compute: Callable[[P, Places], T], prepared: P, places: Places
    ) -> T:
        with generator:
            return compute(prepared, places)
