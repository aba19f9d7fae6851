"""Commands in processes of their own that need not load torch: each is a fork of one that has loaded it already.

A process of `python -m fedlora` takes some six seconds of a core to load its libraries, and tests kill, interrupt and
wait for many. Here one process loads them once, does nothing else, and forks. That commands start as a person starts
them is for `tests/deploy` to say.
"""

import os
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from signal import Signals
from tempfile import mkdtemp

from fedlora.cli.app import main

FORKS = get_context("forkserver")
_loaded = ["fedlora.api", "fedlora.client.deployment.worker", "tests.support.forked"]


def preload(*modules: str) -> None:
    """Have the process that forks load these modules too; to be called when a test's module is imported."""
    _loaded.extend(modules)
    FORKS.set_forkserver_preload(_loaded)


class Forked:
    """A command that runs, with what tests use of `subprocess.Popen`."""

    def __init__(self, *words: str | Path, log: Path | None = None, cwd: Path | None = None) -> None:
        """Append all that it prints to `log`; without one, what it prints and its errors are kept apart."""
        folder = Path(mkdtemp()) if log is None else log.parent
        self._out, self._err = (log, log) if log else (folder / "out", folder / "err")
        told = [*map(str, words)], self._out, self._err, cwd or Path.cwd(), dict(os.environ)
        self._process = FORKS.Process(target=_command, args=told, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; none while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def send_signal(self, what: Signals) -> None:
        os.kill(self._process.pid or 0, what)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"it runs on after {timeout} s"
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, and its errors, once it has ended."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()


def _command(words: list[str], out: Path, err: Path, cwd: Path, env: Mapping[str, str]) -> None:
    """Be the command `fedlora WORDS`, in the forked process."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), descriptor)
    os.umask(0o022)  # that of most machines
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["fedlora", *words]
    main()


preload()
