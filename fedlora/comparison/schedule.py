"""Which runs are to be done: those that find a line's best values of what is tuned, then the other seeds at these.

From its start a line walks towards the lower loss, which is the mean over clients of the loss on one half of what each
holds out: the best point so far, its neighbours on the grid, until all of them are higher.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import inf
from typing import Any

from fedlora.config import Config

from .results import Results, is_diverged, is_failed, run_name
from .settings import Case, Comparison, ComparisonLine

Point = tuple[Any, ...]  # a value for each key that is tuned


@dataclass(frozen=True)
class ComparisonRun:
    """One run: a line in a case, with a seed and a value for each key that is tuned."""

    line: ComparisonLine
    case: Case
    seed: int
    tuned: tuple[tuple[str, Any], ...]  # by dotted key

    @property
    def words(self) -> str:
        """Which run it is, for people."""
        point = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.tuned]
        return ", ".join(filter(None, [self.line.name, self.case.name, *point, f"seed {self.seed}"]))


@dataclass(frozen=True, eq=False)
class Chosen:
    """The values that a line has for what is tuned, and the records of its seeds with them."""

    tuned: Mapping[str, Any]
    records: Mapping[int, Mapping[str, Any]]  # by seed
    is_final: bool  # is no point left to try?


@dataclass(frozen=True, eq=False)
class Schedule:
    """The runs of a comparison, by what is done already."""

    comparison: Comparison
    _names: dict[ComparisonRun, str] = field(default_factory=dict)

    def name(self, run: ComparisonRun) -> str:
        """The name of a run in the file of results."""
        if run not in self._names:
            self._names[run] = run_name(self.config(run), run.line.baseline)
        return self._names[run]

    def config(self, run: ComparisonRun) -> Config:
        """The settings of a run."""
        return self.comparison.config(run.line, run.case, {**dict(run.tuned), "seed": run.seed})

    def ready(self, results: Results) -> Iterator[ComparisonRun]:
        """Yield the runs that can be done now, a line in all its cases before the next."""
        for line in self.comparison.lines:
            for case in self.comparison.cases:
                yield from (run for run in self._next(line, case, results) if self.name(run) not in results)

    def _next(self, line: ComparisonLine, case: Case, results: Results) -> list[ComparisonRun]:
        """The runs of a line in a case that its results so far ask for, done or not."""
        judged = self.judged(line, case, results)
        if judged is None:
            return []
        first, *others = self.comparison.seeds
        if untried := self._untried(judged, line, case):
            return [self._run(line, case, first, point) for point in untried]
        best = self.best(judged)
        return [self._run(line, case, seed, best) for seed in others]

    def _run(self, line: ComparisonLine, case: Case, seed: int, point: Point) -> ComparisonRun:
        return ComparisonRun(line, case, seed, tuple(zip(self.comparison.tune, point, strict=True)))

    @cached_property
    def points(self) -> list[Point]:
        """All points of what is tuned; one without a value where nothing is."""
        return list(product(*self.comparison.tune.values()))

    def judged(self, line: ComparisonLine, case: Case, results: Results) -> dict[Point, float] | None:
        """The loss of every point that was tried, infinite where it came to no number; None where one was refused."""
        found: dict[Point, float] = {}
        for point in self.points:
            done = results.get(self.name(self._run(line, case, self.comparison.seeds[0], point)))
            if done and is_failed(done):
                return None
            if done:
                found[point] = _loss(done)
        return found

    def _untried(self, judged: Mapping[Point, float], line: ComparisonLine, case: Case) -> list[Point]:
        """The points that have to be tried before the best one is known; where it begins, whatever the file has."""
        start = self._start(line, case)
        if start not in judged:
            return [start]
        return [point for point in self._neighbours(self.best(judged)) if point not in judged]

    def best(self, judged: Mapping[Point, float]) -> Point:
        """The point of the lowest loss, the first on the grid of several."""
        return min(sorted(judged, key=self.points.index), key=lambda point: judged[point])

    def _start(self, line: ComparisonLine, case: Case) -> Point:
        """Where the walk begins: at the values that the settings have, or in the middle where they are not there."""
        given = {**self.comparison.base, **line.settings, **case.settings}
        tune = self.comparison.tune
        return tuple(given[k] if given.get(k) in values else values[len(values) // 2] for k, values in tune.items())

    def _neighbours(self, point: Point) -> list[Point]:
        """The points beside this one on the grid, along one key each."""
        found = []
        for i, values in enumerate(self.comparison.tune.values()):
            at = values.index(point[i])
            beside = values[max(0, at - 1) : at] + values[at + 1 : at + 2]
            found += [(*point[:i], value, *point[i + 1 :]) for value in beside]
        return found

    def chosen(self, line: ComparisonLine, case: Case, results: Results) -> Chosen:
        """The best point of a line so far, and the records of its seeds there."""
        judged = self.judged(line, case, results)
        if not judged:
            return Chosen({}, {}, is_final=False)
        best = self.best(judged)
        names = {seed: self.name(self._run(line, case, seed, best)) for seed in self.comparison.seeds}
        records = {seed: results[name]["record"] for seed, name in names.items() if name in results}
        return Chosen(
            tuned=dict(zip(self.comparison.tune, best, strict=True)),
            records={seed: record for seed, record in records.items() if "error" not in record},
            is_final=not self._untried(judged, line, case),
        )

    def marks(self, chosen: Chosen) -> dict[str, str]:
        """Marks of chosen values: "?" where the walk goes on, "*" at an end of the grid."""
        if not chosen.is_final:
            return dict.fromkeys(chosen.tuned, "?")
        tune = self.comparison.tune
        ends = {
            key for key, value in chosen.tuned.items() if len(tune[key]) > 1 and value in (tune[key][0], tune[key][-1])
        }
        return dict.fromkeys(ends, "*")

    def why_not(self, line: ComparisonLine, case: Case, results: Results) -> str:
        """Why a line has no figures: the error of one of its runs, or that there was none."""
        first = self.comparison.seeds[0]
        tried = [results.get(self.name(self._run(line, case, first, point))) for point in self.points]
        return next((str(run["record"]["error"]) for run in tried if run and "error" in run["record"]), "not run")


def _loss(run: Mapping[str, Any]) -> float:
    """The loss by which a run is judged; 0 where nothing is held out and so nothing chosen."""
    loss = run["record"].get("choice", {}).get("loss", 0.0)
    return inf if is_diverged(run) or loss is None else float(loss)
