"""A sweep: many runs, some at a time in processes of their own, and one file that keeps each when it is done."""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedlora.errors import ConfigError
from fedlora.storage.files import hold_lock, write_durably

Results = dict[str, dict[str, dict[str, Any]]]  # line of the table -> run -> record of the run
Settings = Mapping[str, Any]  # that all results of a file have in common


class SweepRun(Protocol):
    """A run, by its line of the table and its name there."""

    @property
    def line(self) -> str: ...
    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=SweepRun)


def sweep(
    ready: Callable[[Results], Iterator[R]],
    measure: Callable[[R], dict[str, Any]],
    said: Callable[[R, Mapping[str, Any]], str],
    file: tuple[Path, Settings],
    jobs: int,
) -> Results:
    """Do every run that is not in the file, `jobs` at a time, and write the file after each.

    `ready` gives the runs that can be done with the results so far; `measure` does one, in another process. Raises
    `ConfigError` where another sweep writes the file.
    """
    running: dict[Future[dict[str, Any]], R] = {}
    lock = hold_lock(file[0].with_name(f".{file[0].name}.lock"), wait=False)
    with lock, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        results = load(*file)
        while True:
            waiting = (run for run in ready(results) if run not in running.values())
            while len(running) < jobs and (run := next(waiting, None)):
                running[pool.submit(measure, run)] = run
            if not running:
                return results
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                results.setdefault(run.line, {})[run.name] = _result(future)
                save(*file, results)
                print(said(run, results[run.line][run.name]), flush=True)


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    """The record of a run, or its error if it failed, so that the others go on; the next call tries it again."""
    error = future.exception()
    return {"error": f"{type(error).__name__}: {error}"} if error else future.result()


def load(out: Path, settings: Settings) -> Results:
    """The results in the file, without the runs that failed. Raises `ConfigError` for results of other settings."""
    if not out.exists():
        return {}
    found = json.loads(out.read_text(encoding="utf-8"))
    if found["settings"] != json.loads(json.dumps(settings)):
        raise ConfigError(f"{out} holds results of other settings; give --out another file, or remove it")
    runs: Results = found["runs"]
    return {name: _succeeded(done) for name, done in runs.items()}


def _succeeded(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: run for name, run in runs.items() if "error" not in run}


def save(out: Path, settings: Settings, results: Results) -> None:
    """Write the results, so that at any moment the file is whole. Raises `CheckpointError` on a full disk."""
    write_durably(out, (json.dumps({"settings": settings, "runs": results}, indent=1) + "\n").encode())
