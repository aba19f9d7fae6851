"""Flower's simulation: worker processes on Ray, driven through the same Grid that a deployment has.

Every worker holds one base model and trains a block of clients in one pass (`flower_blocks`). Flower's entry for this,
`run_simulation`, is deprecated; `Flower.run` alone calls it. What replaces it is `flwr run` with a simulation as the
federation of a SuperLink, a daemon that outlives the command and to which a program is sent as an app.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from queue import Queue
from threading import Event, Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any, cast

from fedlora.config import Config, why_apart
from fedlora.deployment.processes import scratch_folder
from fedlora.environment import configure_libraries, no_proxy
from fedlora.errors import ConfigError, RoundFailed
from fedlora.models.base_model import device
from fedlora.server.rounds import Fleet

if TYPE_CHECKING:
    from flwr.serverapp import Grid

RAY_SOCKET = 66  # bytes that the names of Ray's sockets have below its folder
STORE = 512 * 2**20  # bytes of shared memory for messages on their way; Ray spills what is beyond to the disk
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: one machine, on the loopback interface
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # how long what is left of a killed run waits for the rest of it
}


def simulate(config: Config, folder: Path, serve: Callable[[Fleet], None], answered: Callable[[int], None]) -> None:
    """Give `serve` a fleet of `config.clients` simulated clients that keep their files in `folder`.

    What `serve` raises comes out as it is, and so does Ctrl-C; then, as at the end, all processes are ended. Raises
    `ConfigError` where Ray is not installed, `RoundFailed` where Flower's simulation broke down.
    """
    if config.ray and not config.workers:
        raise ConfigError(f"how many workers the Ray cluster at {config.ray} gives room to is not known; set workers")
    if find_spec("ray") is None:
        raise ConfigError('engine = "flower" needs Ray: pip install "fedlora[ray]"')
    _quiet()
    from fedlora.server.fleet import FlowerFleet
    from fedlora.server.fleet_rules import rules_of
    from fedlora.simulations.flower_blocks import BlockGrid

    with scratch_folder(RAY_SOCKET) as scratch:
        flower = Flower(config, folder.absolute(), scratch)
        flower.start()
        ended = False
        try:
            rules = rules_of(config.server, config.clients, threshold=config.secure.needed, tells_all=True)
            grid = BlockGrid(flower.grid(), config.clients)
            fleet = FlowerFleet(cast("Grid", grid), rules, answered, stop=flower.broken)
            with _terminable():
                serve(fleet)
            ended = True
        except KeyboardInterrupt:
            flower.check()
            raise
        finally:
            flower.end(at_once=not ended)


class Flower(Thread):
    """The simulation in a thread of its own, so that the rounds, and Ctrl-C with them, stay in the main one."""

    def __init__(self, config: Config, folder: Path, scratch: Path) -> None:
        super().__init__(name="flower", daemon=True)
        self.broken = Event()
        self._config, self._folder, self._scratch = config, folder, scratch
        self._grids: Queue[Grid] = Queue()
        self._served = Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Flower's whole life; what it raises is kept for the main thread."""
        from flwr.simulation import run_simulation

        try:
            run_simulation(self._server(), self._client(), self._workers(), backend_config=self._backend())
        except BaseException as e:
            self._error = e
        finally:
            self.broken.set()

    def grid(self) -> "Grid":
        """The Grid, as soon as there is one and Ray runs."""
        import ray

        while not self.broken.wait(0.1):
            if ray.is_initialized() and not self._grids.empty():
                return self._grids.get()
        self.check()
        raise RoundFailed("Flower's simulation ended before it began")

    def check(self) -> None:
        """Raise `RoundFailed` where Flower broke down."""
        cause = self._error
        while cause is not None and cause.__cause__ is not None:
            cause = cause.__cause__
        if cause is not None:
            raise RoundFailed(f"Flower's simulation broke down: {type(cause).__name__}: {cause}") from self._error

    def end(self, at_once: bool) -> None:
        """Let Flower and Ray end; clients that are still at work are given ten seconds, or none."""
        self._served.set()
        with redirect_stdout(StringIO()):  # where Ray tells of processes that ended themselves
            if not at_once:
                self.join(10)
            _flag(self._scratch).touch()
            self.join()

    def _lend(self, grid: "Grid") -> None:
        self._grids.put(grid)
        self._served.wait()

    def _server(self) -> Any:
        from fedlora.server.flower_app import server_app

        return server_app(self._lend)

    def _client(self) -> Any:
        from flwr.app import Context, RecordDict

        from fedlora.client import flower_app, in_process
        from fedlora.client.handlers import ClientContext
        from fedlora.messages.envelope import RawMessage
        from fedlora.simulations.flower_blocks import answer_block

        config, folder, flag = replace(self._config, threads=self._cpus()), self._folder, str(_flag(self._scratch))
        apart = bool(why_apart(config))

        def handle(kind: str, content: RecordDict, context: Context) -> RecordDict:
            def client_for(client: int, message: RawMessage) -> ClientContext:
                return in_process.client_of(in_process.loaded(config), folder, client)

            return answer_block(kind, content, client_for, apart=apart)

        app = flower_app.client_app(handle)

        @app.lifespan()
        def watched(_: object) -> Iterator[None]:
            _leave_on(flag)
            yield

        return app

    def _backend(self) -> Any:
        """What `run_simulation` is told of Ray."""
        cpus, workers = self._cpus(), self._workers()
        share = min(1.0, int(1e4 * self._gpus() / workers) / 1e4)  # Ray counts GPUs in ten-thousandths
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
        own = {
            "address": "local",
            "num_cpus": cpus * workers,
            "num_gpus": self._gpus(),
            "object_store_memory": STORE,
            "_temp_dir": str(self._scratch),
        }
        return {
            "init_args": quiet | ({"address": self._config.ray} if self._config.ray else own),
            # An actor that dies, as of too little memory, is begun anew, and its job once more.
            "client_resources": {"num_cpus": cpus, "num_gpus": share, "max_restarts": -1, "max_task_retries": 1},
        }

    def _workers(self) -> int:
        """Worker processes: as many as the settings say, or else one a GPU, or one for every so many CPUs."""
        most = self._config.workers or self._gpus() or (os.cpu_count() or 1) // self._cpus()
        return max(1, min(most, self._config.clients))

    def _gpus(self) -> int:
        """GPUs that the workers share: this machine's, or of a cluster one for each worker."""
        if device(self._config.model).type != "cuda":
            return 0
        import torch

        return self._config.workers if self._config.ray else torch.cuda.device_count()

    def _cpus(self) -> int:
        """CPUs of a worker, and its threads."""
        asked = self._config.threads or 1
        return asked if self._config.ray else min(asked, os.cpu_count() or 1)


def _quiet() -> None:
    """Nothing is sent, nothing is said: to be called before Flower and Ray are imported, as they read it then."""
    configure_libraries()
    for name, value in RAY.items():
        os.environ.setdefault(name, value)
    os.environ.update(no_proxy())
    import flwr.supercore.logger  # noqa: F401  it sets its level when it is imported

    logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)
    logging.getLogger("ray").setLevel(logging.CRITICAL)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is Ctrl-C, or what it was made before; Ray, as it starts, makes it an abort."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before if callable(before) else signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _flag(scratch: Path) -> Path:
    return scratch / "end"


@cache
def _leave_on(flag: str) -> None:
    """Let this process end itself once the flag is there: Ray would wait for the job it is at."""

    def watch() -> None:
        while not Path(flag).exists():
            time.sleep(0.2)
        os._exit(0)

    Thread(target=watch, daemon=True).start()
