"""What a command costs: time by the clock with its start-up, CPU time and peak memory of all its processes."""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os import environ
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Thread

import psutil

PERIOD = 0.5  # seconds between two looks at the processes


@dataclass(frozen=True)
class Usage:
    """What a command has used, all its processes together."""

    wall: float  # seconds from the start of the command to its end
    cpu: float  # seconds
    peak: int  # bytes, where what processes share counts once
    load: float  # of the machine in the minute before it began

    def record(self) -> dict[str, float]:
        """The same, for a JSON file."""
        return asdict(self)


class ProcessTree(Thread):
    """Looks again and again at a process and all that come from it, and adds up what they use.

    A process's last moments, from the last look to its end, are not in the sum: a quarter of a second on average.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.ended = Event()
        self.peak = 0
        self._root = psutil.Process(pid)
        self._seconds: dict[tuple[int, float], float] = {}  # by process id and start, as ids are used again

    @property
    def cpu(self) -> float:
        """CPU seconds of all processes that were seen."""
        return sum(self._seconds.values())

    def run(self) -> None:
        """Look until the command has ended."""
        while not self.ended.wait(PERIOD):
            self.look()

    def look(self) -> None:
        """Note what every process has used so far."""
        self.peak = max(self.peak, sum(self._memory(process) for process in self._processes()))

    def _processes(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []

    def _memory(self, process: psutil.Process) -> int:
        """The process's memory with its share of what it has in common with others, once its CPU time is noted."""
        try:
            times = process.cpu_times()
            self._seconds[process.pid, process.create_time()] = times.user + times.system
            return int(process.memory_full_info().pss)
        except psutil.Error:
            return 0


def measure(command: Sequence[str], environment: Mapping[str, str], limit: float) -> tuple[Usage, str]:
    """Run a command to its end; return what it used, and what it printed.

    Raises `RuntimeError` with its last lines where it fails, and `subprocess.TimeoutExpired` after `limit` seconds.
    """
    load = psutil.getloadavg()[0]
    with TemporaryFile("w+") as out:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environ | environment, stdout=out, stderr=subprocess.STDOUT)
        tree = ProcessTree(process.pid)
        tree.start()
        try:
            process.wait(limit)
        finally:
            wall = time.monotonic() - began
            tree.ended.set()
            process.kill()
            tree.join()
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {process.returncode}: {text.strip()[-500:]}")
    return Usage(round(wall, 2), round(tree.cpu, 2), tree.peak, round(load, 2)), text


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Within the block so many other processes compute without a pause, each on one thread."""
    with ExitStack() as stack:
        for _ in range(count):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        yield


def machine() -> dict[str, str | int]:
    """The processor, the instructions that torch uses on it, its cores, and torch's version."""
    import torch

    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no",
        "cores": psutil.cpu_count() or 1,
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
