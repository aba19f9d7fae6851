"""Everything that the page says of one run, ready to be put into its template."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from statistics import fmean
from typing import Any

from fedlora import config as configuration
from fedlora.log_lines import counted
from fedlora.run.console import closeness, spending
from fedlora.run.directory import newest
from fedlora.run.privacy_statement import summary_lines
from fedlora.run.sides import asked_of_clients
from fedlora.strategy import load, title

from . import client_data, course
from .charts import Chart
from .client_data import HeatMap
from .client_scores import KINDS, Answer, ClientRow, ClientScores, answer, client_scores
from .course import MetricRow, Participation
from .figures import NOTHING, difference, in_words, is_number, score
from .run_record import RunRecord

MOST_ROWS = 20  # of the clients' table that are open at once
MOST_HIDDEN = 500  # more that can be opened


@dataclass(frozen=True)
class Dot:
    """A score on a client's line."""

    kind: str  # of model
    place: float  # per cent of the line
    said: str


@dataclass(frozen=True)
class TableRow:
    """A client in the table of clients."""

    name: str
    examples: str
    scores: Sequence[str]  # in the order of the table's kinds
    gain: str
    is_worse: bool  # than alone
    dots: Sequence[Dot]


@dataclass(frozen=True)
class ClientTable:
    """The clients, worst first."""

    metric: str
    kinds: Mapping[str, str]  # kind of model -> what it is called
    ends: tuple[str, str]  # what the two ends of the lines stand for
    rows: Sequence[TableRow]
    hidden: Sequence[TableRow]  # that are shown on demand
    left_out: int


@dataclass(frozen=True)
class PrivacySection:
    """What a private run promised and spent, and what an audit found."""

    lines: Sequence[str]
    clients: Sequence[tuple[str, str, int]]  # name, epsilon, rounds that it joined
    audit: str  # its outcome in a sentence
    tests: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunSection:
    """All that the page says of one run."""

    run: RunRecord
    title: str
    facts: Sequence[str]
    answer: Answer
    tiles: Sequence[tuple[str, str]]  # name, value
    table: ClientTable | None
    learning: Sequence[Chart]
    metrics: Sequence[MetricRow]
    costs: Sequence[tuple[str, str]]
    cost_charts: Sequence[Chart]
    participation: Participation
    exactness: str
    privacy: PrivacySection | None
    data: Sequence[str]
    heat: HeatMap | None
    warnings: Sequence[str]
    base: str  # model of the adapter
    changed: Sequence[tuple[str, str]]  # settings that are not as by default
    others: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]


def section(run: RunRecord) -> RunSection:
    """What the page says of a run."""
    scores = client_scores(run)
    changed, others = _settings(run.settings)
    common_model = not _kept(run)
    return RunSection(
        run=run,
        title=title_of(run),
        facts=_facts(run),
        answer=answer(run, scores, common_model=common_model),
        tiles=_tiles(run, scores),
        table=client_table(scores) if scores else None,
        learning=course.learning_charts({"": run}),
        metrics=course.metric_rows(run) if common_model else [],
        costs=course.costs(run),
        cost_charts=course.cost_charts(run),
        participation=course.participation(run),
        exactness=_exactness(run),
        privacy=_privacy(run),
        data=client_data.data_lines(run),
        heat=client_data.heat_map(run),
        warnings=[*run.inputs.get("warnings", []), *run.inputs.get("notes", [])],
        base=str(run.settings.get("model.path") or "the small model that comes with fedlora"),
        changed=changed,
        others=others,
        versions=_versions(run),
    )


def title_of(run: RunRecord) -> str:
    """The paper's name for the run's strategy, or its name in the settings where it is not to be found here."""
    name = str(run.settings["strategy"])
    with suppress(Exception):  # a user's strategy may be gone, and is code
        return title(load(name, **run.settings.get("option", {})))
    return name


def _kept(run: RunRecord) -> bool:
    """Do clients keep something of what they train, so that there is no common model?"""
    if run.settings.get("model.head") == "local":
        return True
    with suppress(Exception):  # a user's strategy may be gone, and is code
        asked = asked_of_clients(load(str(run.settings["strategy"]), **run.settings.get("option", {})))
        return bool(asked.keeps_rank or {*asked.trains} - {*asked.shares})
    return False


def _facts(run: RunRecord) -> list[str]:
    """The run in a few words each."""
    settings, done = run.settings, len(run.rounds)
    clients = settings["clients"] or len(run.inputs.get("data", {}).get("sizes", []))
    cohort = f", {settings['cohort']} a round" if settings["cohort"] else ""
    planned = f" of {settings['rounds']}" if done != settings["rounds"] else ""
    engine = "on machines of their own" if run.is_deployed else f"simulated, engine {settings['engine']}"
    return [
        f"{counted(clients, 'client')}{cohort}, {engine}",
        f"{counted(done, 'round')}{planned}",
        f"adapter of rank {settings['lora.ranks'] or settings['lora.rank']}",
        f"seed {settings['seed']}",
    ]


def _tiles(run: RunRecord, scores: ClientScores | None) -> list[tuple[str, str]]:
    """The few figures that stand large."""
    tiles = [(f"{KINDS[kind]}, mean", _mean(scores, kind)) for kind in _shown_first(scores)] if scores else []
    if scores and "federated" in scores.kinds:
        tiles.append(("federated, worst client", score(scores.metric, scores.worst("federated").scores["federated"])))
    if not scores:
        tiles += [(f"{row.name}, {row.before} before", row.after) for row in course.metric_rows(run)[:1]]
    sent = dict(course.costs(run)).get(course.SENT)
    tiles += [("sent by a client in a round", sent)] if sent else []
    if epsilon := _last(run, "epsilon"):
        tiles.append(("epsilon spent, at most", f"{epsilon:.3g}"))
    return tiles


def _shown_first(scores: ClientScores) -> list[str]:
    """The kinds of models, those of the federation before that of training alone."""
    return sorted(scores.kinds, key=lambda kind: kind == "alone")


def _mean(scores: ClientScores, kind: str) -> str:
    return score(scores.metric, fmean(scores.values(kind)))


def _last(run: RunRecord, key: str) -> float | None:
    """The last figure of the rounds under a key; None where there is none."""
    return next((record[key] for record in reversed(run.rounds) if is_number(record.get(key))), None)


def client_table(scores: ClientScores) -> ClientTable:
    """The table of the clients, with a line for each on which its scores are marked."""
    every = [value for row in scores.rows for value in row.scores.values()]
    low, high = min(every), max(every)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 0.05
    rows = [_table_row(scores, row, low - pad, high + pad) for row in scores.rows]
    return ClientTable(
        metric=in_words(scores.metric),
        kinds={kind: KINDS[kind] for kind in scores.kinds},
        ends=(score(scores.metric, low), score(scores.metric, high)),
        rows=rows[:MOST_ROWS],
        hidden=rows[MOST_ROWS : MOST_ROWS + MOST_HIDDEN],
        left_out=len(rows[MOST_ROWS + MOST_HIDDEN :]),
    )


def _table_row(scores: ClientScores, row: ClientRow, low: float, high: float) -> TableRow:
    """A client's row; `low` and `high` are the ends of its line."""
    best = row.scores.get("personal", row.scores.get("federated"))
    alone = row.scores.get("alone")
    gain = best - alone if best is not None and alone is not None else None
    dots = [
        Dot(kind, round(100 * (value - low) / (high - low), 2), f"{KINDS[kind]}: {score(scores.metric, value)}")
        for kind, value in row.scores.items()
    ]
    return TableRow(
        name=row.name,
        examples=f"{row.examples:,}" if row.examples else NOTHING,
        scores=[score(scores.metric, row.scores.get(kind)) for kind in scores.kinds],
        gain=difference(scores.metric, gain),
        is_worse=gain is not None and scores.sign * gain < 0,
        dots=dots,
    )


def _exactness(run: RunRecord) -> str:
    """Whether the model was the mean of the clients' models, in a sentence."""
    distances = [record["exactness"] for record in run.rounds if is_number(record.get("exactness"))]
    if distances:
        return closeness(distances).removeprefix("exactness: ").capitalize() + "."
    if run.settings.get("exactness") and not run.hides_clients:
        return closeness([]).removeprefix("exactness: ").capitalize() + "."
    return "Whether the model was the mean of the clients' models was not measured (--exactness does it)."


def _privacy(run: RunRecord) -> PrivacySection | None:
    """What a private run promised and spent; None of one that promised nothing."""
    if not run.is_private:
        return None
    found, lines = run.privacy, []
    if found:
        lines += [line.removeprefix("privacy: ") for line in summary_lines(found)]
    if _last(run, "epsilon") is not None:
        lines.append(spending(run.rounds).removeprefix("privacy: "))
    spent = found.get("spent", {}).get("clients", {}) if not run.hides_clients else {}
    ledger = sorted(spent.items(), key=lambda item: -item[1]["epsilon"])[:MOST_ROWS]
    tests = run.audit.get("tests", [])
    return PrivacySection(
        lines=lines,
        clients=[(run.name_of(i), f"{own['epsilon']:.3g}", own["rounds_joined"]) for i, own in ledger],
        audit=_audit(run),
        tests=[{**test, "measured": course.plain(test["measured"])} for test in tests],
    )


def _audit(run: RunRecord) -> str:
    """What the audit came to, in a sentence."""
    if not run.audit:
        return f"It was not audited; fedlora audit {run.folder} tests the claim."
    failed = sum(not test["passed"] for test in run.audit.get("tests", []))
    if run.audit.get("passed"):
        return f"fedlora audit passed: all {len(run.audit['tests'])} tests."
    return f"fedlora audit FAILED: {counted(failed, 'test')} did not pass."


def _settings(settings: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The settings that are not as by default, and those that are; each with its value as text."""
    defaults = {setting.key: setting.default for setting in configuration.settings()}
    changed: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for key, value in sorted(settings.items()):
        is_default = key in defaults and _text(value) == _text(defaults[key])
        (others if is_default else changed).append((key, _text(value)))
    return changed, others


def _text(value: Any) -> str:
    """A setting's value as it would be given on the command line."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_text(content)}" for name, content in value.items()) or NOTHING
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    return "inf" if value == inf else str(value) if value != "" else NOTHING


def _versions(run: RunRecord) -> list[tuple[str, str]]:
    """The versions of what computed the run, where they were kept."""
    found: Mapping[str, Any] = run.about.get("versions") or run.privacy.get("versions") or {}
    return [(str(name), str(version)) for name, version in found.items()]


def overview(run: RunRecord) -> dict[str, str]:
    """The run as a row of the table of several, by the heading of each column."""
    scores, metric = client_scores(run), course.headline_of(run)
    rows = {row.name: row for row in course.metric_rows(run)} if not _kept(run) else {}
    common = rows.get(in_words(metric), MetricRow(metric, NOTHING, NOTHING))
    costs = dict(course.costs(run))
    own: Mapping[str, Any] = newest(run.rounds, "eval_clients").get("eval_clients", {})
    return {
        "strategy": title_of(run),
        "seed": str(run.settings["seed"]),
        "rounds": str(len(run.rounds)),
        "metric": in_words(metric),
        "before": common.before,
        "common model": common.after,
        "clients' mean": score(metric, own.get("mean")),
        "worst client": score(metric, own.get("worst")),
        "alone": _mean(scores, "alone") if scores and "alone" in scores.kinds else NOTHING,
        course.UP: costs.get(course.UP, NOTHING),
        "time": costs.get(course.TIME, NOTHING),
        "off the mean": _written(_last(run, "exactness"), course.small_share),
        "epsilon": _written(_last(run, "epsilon"), course.plain),
    }


def _written(value: float | None, written: Callable[[float], str]) -> str:
    return NOTHING if value is None else written(value)
