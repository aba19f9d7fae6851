"""Runs in processes of their own, some at a time, each of which keeps its model and encoded rows from run to run."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from queue import Empty
from typing import Any

from fedlora.config import Config
from fedlora.errors import FedloraError

LOOK = 0.5  # seconds between looks at how far runs are

_queue: Any = None  # of a worker: where it says how far it is


@dataclass(frozen=True)
class RunOrder:
    """What a worker is to run."""

    name: str
    config: Config
    baseline: str


@dataclass(eq=False)
class Workers:
    """A pool of processes, and the runs that are under way in it."""

    jobs: int
    under_way: dict[Future[dict[str, Any]], RunOrder] = field(default_factory=dict)
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)  # run -> rounds done, of how many

    def __enter__(self) -> "Workers":
        context = get_context("spawn")
        self._said = context.Queue()
        self._pool = ProcessPoolExecutor(self.jobs, context, _begin, (self._said,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes():
            process.terminate()

    def _processes(self) -> list[Any]:
        return [*(getattr(self._pool, "_processes", None) or {}).values()]

    @property
    def has_room(self) -> bool:
        """May another run begin?"""
        return len(self.under_way) < self.jobs

    def begin(self, order: RunOrder) -> None:
        """Have a process do this run."""
        self.under_way[self._pool.submit(_measured, order)] = order

    def ended(self, shown: Callable[[], None]) -> Iterator[tuple[RunOrder, dict[str, Any]]]:
        """Wait until a run ends; yield each that has, with its record. `shown` is called as runs go on."""
        done: set[Future[dict[str, Any]]] = set()
        while not done:
            done = wait(self.under_way, timeout=LOOK, return_when=FIRST_COMPLETED).done
            self._listen()
            shown()
        for future in done:
            order = self.under_way.pop(future)
            self.progress.pop(order.name, None)
            yield order, future.result()

    def _listen(self) -> None:
        """Take in what the processes have said."""
        while True:
            try:
                name, done, rounds = self._said.get_nowait()
            except Empty:
                return
            self.progress[name] = (done, rounds)


def _begin(queue: Any) -> None:
    """Make this process a worker, which ends with the one that started it, however that ends."""
    global _queue
    _queue = queue
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _measured(order: RunOrder) -> dict[str, Any]:
    """Do a run; the record is its error where it is refused or fails, so that the others go on."""
    from .measure import measure

    try:
        return measure(order.config, order.baseline, _tell(order.name))
    except FedloraError as e:
        return {"error": str(e)}
    except Exception as e:  # whatever a user's own code, or a library, raises
        return {"error": f"{type(e).__name__}: {e}"}


def _tell(name: str) -> Callable[[int, int], None]:
    return lambda done, rounds: _queue.put((name, done, rounds))
