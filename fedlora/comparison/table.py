"""The table of a comparison: a row for each line, in a part for each case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from .packed import unpack
from .results import Results
from .schedule import Schedule
from .settings import Case, ComparisonLine
from .statistics import Difference, Interval, difference, holm, interval

OWN = ("loss", "mean", "worst")  # of clients' own models on what they hold out
TRAFFIC = ("bytes_up", "bytes_down")
WHOLE = ("exactness", "epsilon", "cpu", "seconds")  # of a run


@dataclass(frozen=True, eq=False)
class Row:
    """A line in a case: its figures, each a mean over seeds with a confidence interval; or why there are none."""

    line: str
    case: str
    tuned: Mapping[str, Any]  # the values that were chosen
    marks: Mapping[str, str]  # of these: "*" at an end of its grid, beyond which a better one may lie; "?": still tuned
    records: Mapping[int, Mapping[str, Any]]  # by seed
    wanted: int = 1  # seeds
    why_not: str = ""
    figures: Mapping[str, Interval] = field(default_factory=dict)
    against: str = ""  # the line that it is compared with
    difference: Difference | None = None  # of the figures on the test split from that line's
    p: float | None = None  # of the difference, after Holm's correction for all that the case compares

    @property
    def metric(self) -> str:
        """The metric that is shown; empty where there is no figure."""
        told = [record["own"]["metric"] for record in self.records.values() if record.get("own")]
        return str(told[0]) if told else ""

    def record(self) -> dict[str, Any]:
        """The row as JSON holds it."""
        one = self.difference._asdict() if self.difference else None
        return {
            "line": self.line,
            "case": self.case,
            "seeds": list(self.records),
            "tuned": dict(self.tuned),
            "metric": self.metric,
            "figures": {name: value._asdict() for name, value in self.figures.items()},
            "against": self.against,
            "difference": one and {**one, "p_holm": self.p},
            "why_not": self.why_not,
        }


def rows(schedule: Schedule, results: Results) -> list[Row]:
    """All rows, a case after another."""
    made = schedule.comparison
    parts = ([_row(schedule, line, case, results) for line in made.lines] for case in made.cases)
    return [row for part in parts for row in compared(part, made.reference)]


def _row(schedule: Schedule, line: ComparisonLine, case: Case, results: Results) -> Row:
    chosen = schedule.chosen(line, case, results)
    return Row(
        line=line.name,
        case=case.name,
        tuned=chosen.tuned,
        marks=schedule.marks(chosen),
        records=chosen.records,
        wanted=len(schedule.comparison.seeds),
        why_not="" if chosen.records else schedule.why_not(line, case, results),
        figures=figures([*chosen.records.values()]),
    )


def figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
    """Every figure that all records have, over the seeds."""
    each = [_numbers(record) for record in records]
    shared = [key for key in each[0] if all(key in one for one in each)] if each else []
    return {key: interval([one[key] for one in each]) for key in shared}


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one run, by the names of their columns."""
    own, test = record.get("own", {}), record.get("test", {}).get("values", {})
    found = {f"test {name}": value for name, value in test.items()}
    found |= {f"own {name}": own[name] for name in OWN if own.get(name) is not None}
    found |= {key: _of_a_round(record[key]) for key in TRAFFIC if record.get(key)}
    whole = {**record, "exactness": _largest(record.get("exactness", ()))}
    return found | {key: whole[key] for key in WHOLE if whole.get(key) is not None}


def _largest(distances: Sequence[float | None]) -> float | None:
    """The largest distance of a round; None where none was measured."""
    return max((d for d in distances if d is not None), default=None)


def _of_a_round(counts: Sequence[int]) -> float:
    """Bytes of a round, on the average of all but the first, in which clients are sent what stays the same."""
    return fmean(counts[1:] or counts)


def compared(part: Sequence[Row], reference: str) -> list[Row]:
    """The rows of a case, each with its difference from the one that the others are compared with."""
    base = next(row for row in part if row.line == reference)
    found = [row if row is base else replace(row, against=reference, difference=_difference(row, base)) for row in part]
    corrected = iter(holm([row.difference.p for row in found if row.difference]))
    return [replace(row, p=next(corrected)) if row.difference else row for row in found]


def _difference(row: Row, base: Row) -> Difference | None:
    """How far a row is from another on the test split; None where they have no seed with such figures in common."""
    one, other = _tests(row), _tests(base)
    both = [seed for seed in one if seed in other]
    if not both or any(_kind(one[seed]) != _kind(other[seed]) for seed in both):
        return None
    ones, others = ({seed: unpack(tests[seed]["examples"]) for seed in both} for tests in (one, other))
    return difference(ones, others, same=len({_kind(one[seed]) for seed in both}) == 1)


def _tests(row: Row) -> dict[int, Mapping[str, Any]]:
    """What each seed came to on the test split."""
    return {seed: record["test"] for seed, record in row.records.items() if "test" in record}


def _kind(test: Mapping[str, Any]) -> tuple[str, str]:
    """What the figures of examples are, and of which examples: figures of one kind are compared."""
    return test["of"], test["set"]
