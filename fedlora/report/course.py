"""The course of a run, or of several: learning curves, what it cost, who took part, who failed and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedlora.log_lines import counted
from fedlora.metrics import HEADLINES
from fedlora.run.console import EXACT, size
from fedlora.run.directory import newest

from .charts import Chart, Series, bar_chart, line_chart
from .figures import duration, in_words, is_number, runs_of, score
from .run_record import RunRecord

MOST_CURVES = 8  # clients up to which each has a curve of its own
MOST_FAILURES = 15  # rows of the table of failures
BYTES = (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")
UP, SENT, TIME = "sent by clients", "by one client in a round, mean", "time of all rounds"  # of what a run cost
Points = list[tuple[float, float]]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class FailureRow:
    """A client that failed, in which rounds, and the reason."""

    client: str
    rounds: str
    reason: str


@dataclass(frozen=True)
class Participation:
    """Who took part, in words and, where anybody failed, as bars and as a table."""

    sentence: str
    chart: Chart | None
    failures: Sequence[FailureRow]
    left_out: int  # rows that the table has no room for


@dataclass(frozen=True)
class MetricRow:
    """A figure of the common model, before the run and after it."""

    name: str
    before: str
    after: str


def headline_of(run: RunRecord) -> str:
    """The name of the metric by which the run's models are measured first; empty where none was measured."""
    for key in ("eval", "eval_clients"):
        found = newest(run.rounds, key).get(key) or {}
        names = [found.get("metric")] if key == "eval_clients" else found
        if name := next((name for name in HEADLINES if name in names), ""):
            return name
    return ""


def metric_rows(run: RunRecord) -> list[MetricRow]:
    """Every figure of the common model, first the headline."""
    before: Record = run.rounds[0].get("before", {}) if run.rounds else {}
    after: Record = newest(run.rounds, "eval").get("eval") or {}
    first = headline_of(run)
    names = sorted(after, key=lambda name: name != first)
    return [MetricRow(in_words(name), score(name, before.get(name)), score(name, after[name])) for name in names]


def learning_charts(runs: Mapping[str, RunRecord]) -> list[Chart]:
    """The curves of one run, or of several over each other: scores, training loss, distance from the mean, epsilon."""
    metric = next(filter(None, map(headline_of, runs.values())), "")
    one = next(iter(runs.values())) if len(runs) == 1 else None
    charts = (
        [_score_chart(one, metric), _client_chart(one, metric), *_own_charts(one)]
        if one
        else [*_score_charts(runs, metric)]
    )
    for title, key, written in FIGURES:
        curves = [Series(name, _points(run.rounds, key)) for name, run in runs.items()]
        charts.append(None if key == "exactness" and _is_nothing(curves) else line_chart(title, curves, written))
    return [chart for chart in charts if chart]


def _own_charts(run: RunRecord) -> Iterator[Chart | None]:
    """Yield a curve for each figure of the strategy's own."""
    for name in sorted({name for record in run.rounds for name in record.get("notes", {})}):
        curve = Series(name, [(r["round"], r["notes"][name]) for r in run.rounds if is_number(_note(r, name))])
        yield line_chart(f"{in_words(name)} (the strategy's own figure)", [curve], plain)


def _note(record: Record, name: str) -> Any:
    return record.get("notes", {}).get(name)


def _score_chart(run: RunRecord, metric: str) -> Chart | None:
    """The headline of one run by round: of the common model, of the clients' mean, and of the worst client."""
    own = "on clients' own examples: "
    return line_chart(
        in_words(metric).capitalize(),
        [
            Series("common model", _evaluations(run, metric)),
            Series(f"{own}mean", _of_clients(run, metric, "mean")),
            Series(f"{own}worst client", _of_clients(run, metric, "worst")),
        ],
        lambda value: score(metric, value),
    )


def _client_chart(run: RunRecord, metric: str) -> Chart | None:
    """The headline of each client by round, where they are few and told it."""
    points: defaultdict[str, Points] = defaultdict(list)
    for record in run.rounds:
        for client, figures in record.get("each", {}).items():
            if is_number(figures.get(metric)):
                points[client].append((record["round"], figures[metric]))
    if len(points) > MOST_CURVES:
        return None
    curves = [Series(run.name_of(client), points[client]) for client in sorted(points, key=int)]
    title = f"{in_words(metric)} of each client on its own examples".capitalize()
    return line_chart(title, curves, lambda value: score(metric, value))


def _score_charts(runs: Mapping[str, RunRecord], metric: str) -> Iterator[Chart | None]:
    """Yield the headline of several runs: by round, by bytes, and of the clients' mean and the worst client."""
    title = in_words(metric)

    def written(value: float) -> str:
        return score(metric, value)

    def chart(name: str, points: Callable[[RunRecord], Points], x: str = "round") -> Chart | None:
        return line_chart(name, [Series(n, points(run)) for n, run in runs.items()], written, x)

    yield chart(f"{title} of the common model".capitalize(), lambda run: _evaluations(run, metric))
    yield chart("The same by what clients sent", lambda run: _by_bytes(run, metric), "MB sent")
    yield chart(
        f"{title} of clients on their own examples, mean".capitalize(), lambda r: _of_clients(r, metric, "mean")
    )
    yield chart(f"{title} of the worst client".capitalize(), lambda r: _of_clients(r, metric, "worst"))


def _evaluations(run: RunRecord, metric: str) -> Points:
    """The common model's metric by round, from before the first."""
    before = run.rounds[0].get("before", {}).get(metric) if run.rounds else None
    start = [(0, before)] if is_number(before) else []
    return [*start, *((r["round"], r["eval"][metric]) for r in run.rounds if is_number((r["eval"] or {}).get(metric)))]


def _by_bytes(run: RunRecord, metric: str) -> Points:
    """The common model's metric by megabytes that clients have sent until then."""
    sent = dict(
        zip((r["round"] for r in run.rounds), accumulate(r.get("bytes_up", 0) for r in run.rounds), strict=True)
    )
    return [(sent.get(n, 0) / 1e6, value) for n, value in _evaluations(run, metric)] if any(sent.values()) else []


def _of_clients(run: RunRecord, metric: str, which: str) -> Points:
    """Mean or worst of the clients' own scores by round."""
    told = ((r["round"], r.get("eval_clients") or {}) for r in run.rounds)
    return [(n, found[which]) for n, found in told if found.get("metric") == metric and is_number(found[which])]


def _points(rounds: Sequence[Record], key: str) -> Points:
    """A figure of the rounds, of those that have it."""
    return [(record["round"], record[key]) for record in rounds if is_number(record.get(key))]


def cost_charts(run: RunRecord) -> list[Chart]:
    """Bytes and seconds of a run, round by round."""
    sent = [record.get("bytes_up", 0) + record.get("bytes_down", 0) for record in run.rounds]
    unit, called = next((u for u in BYTES if max(sent, default=0) >= u[0]), BYTES[-1])
    traffic = [
        Series(name, [(n, value / unit) for n, value in _points(run.rounds, key)])
        for name, key in (("up, from clients", "bytes_up"), ("down, to clients", "bytes_down"))
    ]
    charts = [line_chart(f"{called} in a round", traffic, plain)]
    charts.append(line_chart("Seconds of a round", [Series("seconds", _points(run.rounds, "seconds"))], plain))
    return [chart for chart in charts if chart]


def costs(run: RunRecord) -> list[tuple[str, str]]:
    """What a run cost in all, by name; empty where that would tell how many clients were in its rounds."""
    if run.hides_clients or not run.rounds:
        return []
    up, down, seconds = (sum(r.get(key) or 0 for r in run.rounds) for key in ("bytes_up", "bytes_down", "seconds"))
    asked = sum(record["clients"] for record in run.rounds) or 1
    told = [
        (UP, size(up)),
        ("sent to clients", size(down)),
        (SENT, size(round(up / asked))),
        (TIME, duration(seconds)),
    ]
    clock: Any = newest(run.rounds, "clock").get("clock")
    return [*told, ("on the simulated clock", duration(clock))] if is_number(clock) else told


def participation(run: RunRecord) -> Participation:
    """Who took part in a run, and who failed and why."""
    if run.hides_clients:
        return Participation(
            "The run hides its clients (dp.level = client): who was in which round, how many were, what they sent and "
            "how long it took stay with the server, in its run directory.",
            None,
            [],
            0,
        )
    asked, answered = (sum(record[key] for record in run.rounds) for key in ("clients", "answered"))
    rows = _failure_rows(run)
    if asked == answered:
        said = f"All clients that were asked answered, in {counted(len(run.rounds), 'round')}: {asked:,} answers."
        return Participation(said + _staleness(run), None, [], 0)
    bars = [(float(r["answered"]), float(r["clients"] - r["answered"])) for r in run.rounds]
    said = f"{answered:,} of {asked:,} times a client that was asked answered; the others: {_reasons(run)}."
    chart = bar_chart("Clients in each round", bars, ("answered", "failed"))
    return Participation(said + _staleness(run), chart, rows[:MOST_FAILURES], len(rows[MOST_FAILURES:]))


def _reasons(run: RunRecord) -> str:
    """Every reason with how often it was given, the most frequent first."""
    often = Counter(str(reason) for record in run.rounds for reason in record["failed"].values())
    return "; ".join(f"{reason} ({number})" for reason, number in often.most_common())


def _failure_rows(run: RunRecord) -> list[FailureRow]:
    """Every client and reason, those with most failures first."""
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for record in run.rounds:
        for client, reason in record["failed"].items():
            found[(client, str(reason))].append(record["round"])
    often = sorted(found.items(), key=lambda item: (-len(item[1]), int(item[0][0])))
    return [FailureRow(run.name_of(client), runs_of(rounds), reason) for (client, reason), rounds in often]


def _staleness(run: RunRecord) -> str:
    """How old the updates of an asynchronous run were, in a sentence; empty of another."""
    ages = [age for record in run.rounds for _, age in record.get("arrivals", ())]
    if not ages:
        return ""
    mean = sum(ages) / len(ages)
    return f" Updates came whenever they were ready, {mean:.1f} versions old in the mean, {max(ages)} at most."


def _is_nothing(curves: Sequence[Series]) -> bool:
    """Are these distances no more than rounding leaves?"""
    return all(distance < EXACT for curve in curves for _, distance in curve.points)


def plain(value: float) -> str:
    """A number in as few digits as tell it apart."""
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.2e}"


def small_share(value: float) -> str:
    """A share in per cent, and one that is as good as nothing as a power of ten."""
    return f"{100 * value:.3g} %" if value == 0 or value >= 1e-5 else f"{value:.0e}"


FIGURES: Sequence[tuple[str, str, Callable[[float], str]]] = (  # title, key of a round's record, how it is written
    ("Training loss", "train_loss", plain),
    ("Epsilon spent, at most", "epsilon", plain),
    ("Distance from the mean of the clients' models", "exactness", small_share),
)
