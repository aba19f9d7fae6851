"""Every run of a comparison that is not done yet, and the file of results, which is written after each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from fedlora.storage.files import hold_lock

from .results import Results, load, save, settings_of
from .schedule import ComparisonRun, Schedule
from .workers import RunOrder, Workers


class ComparisonObserver(Protocol):
    """What is told of a comparison as it goes on."""

    def going_on(self, workers: Workers, results: Results) -> None:
        """Runs are under way."""

    def ended(self, run: ComparisonRun, record: dict[str, Any]) -> None:
        """A run is over, and kept."""


def carry_out(schedule: Schedule, out: Path, jobs: int, observer: ComparisonObserver) -> Results:
    """Do the runs that are left, `jobs` at a time; return all results. Raises `ConfigError` where another does so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    begun: dict[str, ComparisonRun] = {}
    with hold_lock(out.with_name(f".{out.name}.lock"), wait=False), Workers(jobs) as workers:
        results = load(out)
        while True:
            for run in _startable(schedule, results, workers):
                order = _order(schedule, run)
                begun[order.name] = run
                workers.begin(order)
            if not workers.under_way:
                return results
            for order, record in workers.ended(lambda: observer.going_on(workers, results)):
                run = begun.pop(order.name)
                results[order.name] = _kept(run, order, record)
                save(out, results)
                observer.ended(run, record)


def _startable(schedule: Schedule, results: Results, workers: Workers) -> Iterator[ComparisonRun]:
    """Yield runs that can be done and are not under way, as long as there is room."""
    for run in schedule.ready(results):
        if not workers.has_room:
            return
        if schedule.name(run) not in {order.name for order in workers.under_way.values()}:
            yield run


def _order(schedule: Schedule, run: ComparisonRun) -> RunOrder:
    return RunOrder(schedule.name(run), schedule.config(run), run.line.baseline)


def _kept(run: ComparisonRun, order: RunOrder, record: dict[str, Any]) -> dict[str, Any]:
    """A run as the file holds it."""
    named = {"line": run.line.name, "case": run.case.name, "seed": run.seed, "tuned": dict(run.tuned)}
    return {**named, "settings": settings_of(order.config), "record": record}
