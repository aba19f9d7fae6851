"""Start processes, start again those that end, and end them all: the same for `fedlora server` and `fedlora client`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from .processes import Process, stop


@dataclass(frozen=True)
class Restart:
    """Why a process ended, in words, and how long it stays down."""

    reason: str
    pause: float  # seconds


def restart_later(process: Process) -> Restart:
    """Start the process again, after a longer pause each time that it did not live for a minute."""
    return Restart(f"code {process.code}", process.pause())


class Supervisor:
    """Processes of which each is started again when it ends. All are ended at the end of a `with`.

    `on_exit` says why a process ended and when it is started again; what `on_exit` raises ends the supervision.
    """

    def __init__(self, on_exit: Callable[[Process], Restart] = restart_later) -> None:
        self._on_exit = on_exit
        self._processes: list[Process] = []  # in the order in which they were started
        self._due: dict[str, float] = {}  # name of a process that is down -> when it is started again

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop(self._processes)

    def start(self, process: Process) -> None:
        """Start the process, and watch over it from now on. Raises `ConfigError` where there is no such program."""
        self._processes.append(process)
        process.start()

    def look(self) -> None:
        """Start again what is due; say what has ended since the last look. To be called a few times a second."""
        for process in self._processes:
            if not process.alive:
                self._bring_back(process)

    def _bring_back(self, process: Process) -> None:
        due = self._due.get(process.name)
        if due is None:
            restart = self._on_exit(process)
            print(f"{process.name} ended: {restart.reason}; started again in {restart.pause:.0f} s", flush=True)
            self._due[process.name] = time.monotonic() + restart.pause
        elif time.monotonic() >= due:
            del self._due[process.name]
            process.start()
