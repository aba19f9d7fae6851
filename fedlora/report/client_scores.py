"""Did federation help, whom, and by how much: each client's scores by several models, on its own held-out examples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from statistics import fmean, median, stdev
from typing import Any

from fedlora.log_lines import counted
from fedlora.metrics import HEADLINES
from fedlora.run.directory import newest

from .figures import SHARES, difference, in_words, interval, is_number, score
from .run_record import RunRecord

KINDS = {"alone": "alone", "federated": "federated", "personal": "with own steps"}  # of models, and what each is called
STAGES = {"before": "federated", "personal": "personal", "alone": "alone"}  # rows of personal.json
CONFIDENCE = 0.95
FEWEST = 3  # clients from which an interval of their mean can be given
SKEWED = 0.7  # share of a client's most frequent class, in the mean, from which own scores say little of the task


@dataclass(frozen=True)
class ClientRow:
    """A client and how good each kind of model is for it."""

    client: int
    name: str
    examples: int  # held-out ones, on which it was scored; 0: not known
    scores: Mapping[str, float]  # kind of model -> value


@dataclass(frozen=True)
class ClientScores:
    """The scores of all clients that told some, worst first."""

    metric: str
    rows: Sequence[ClientRow]

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if HEADLINES.get(self.metric, True) else -1

    @property
    def kinds(self) -> list[str]:
        """The kinds of models that any client has a score of."""
        return [kind for kind in KINDS if any(kind in row.scores for row in self.rows)]

    def values(self, kind: str) -> list[float]:
        """The scores of one kind of model, in the order of the rows."""
        return [row.scores[kind] for row in self.rows if kind in row.scores]

    def worst(self, kind: str) -> ClientRow:
        """The client that one kind of model serves worst."""
        return min((row for row in self.rows if kind in row.scores), key=lambda row: self.sign * row.scores[kind])


@dataclass(frozen=True)
class Comparison:
    """One kind of model held against training alone, over the clients that have both."""

    kind: str
    clients: int
    better: int  # clients
    worse: int
    mean: float  # difference, in the direction in which more is better
    interval: tuple[float, float] | None  # of that mean, over clients; None of too few

    @property
    def is_clear(self) -> bool:
        """Does the interval leave out zero?"""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Answer:
    """The first thing that a report says."""

    verdict: str
    sentences: Sequence[str]
    remedy: str = ""  # what to do to have an answer, where there is none
    command: str = ""


def client_scores(run: RunRecord) -> ClientScores | None:
    """Each client's scores: of the last round, after its own steps, and alone; None where no client told any."""
    metric, kinds = _after_stages(run.stages) or _of_last_round(run)
    clients = sorted({int(i) for values in kinds.values() for i in values})
    rows = [_client_row(run, client, kinds) for client in clients]
    scored = [row for row in rows if row.scores]
    return _worst_first(ClientScores(metric, scored)) if scored else None


def _client_row(run: RunRecord, client: int, kinds: Mapping[str, Mapping[str, Any]]) -> ClientRow:
    """What is known of one client; `kinds` has the scores of all, by kind of model and client."""
    held, told_of = run.inputs.get("data", {}).get("heldout", []), newest(run.rounds, "each").get("each", {})
    counted_by_it = told_of.get(str(client), {}).get("heldout", 0)
    return ClientRow(
        client=client,
        name=run.name_of(client),
        examples=counted_by_it or (held[client] if client < len(held) else 0),
        scores={kind: values[str(client)] for kind, values in kinds.items() if is_number(values.get(str(client)))},
    )


def _worst_first(scores: ClientScores) -> ClientScores:
    """The same with the clients that are served worst first; those without such a score come last."""
    kind = "federated" if "federated" in scores.kinds else scores.kinds[0]
    values = {row.client: scores.sign * row.scores[kind] for row in scores.rows if kind in row.scores}
    return replace(scores, rows=sorted(scores.rows, key=lambda row: values.get(row.client, inf)))


def _after_stages(stages: Mapping[str, Any]) -> tuple[str, dict[str, Mapping[str, Any]]] | None:
    """The metric of personal.json, and each client's score by kind of model; None where it has none."""
    rows = stages.get("rows") or {}
    if not rows:
        return None
    each = stages.get("each", {})
    return str(next(iter(rows.values()))["metric"]), {STAGES[row]: each[row] for row in STAGES if row in each}


def _of_last_round(run: RunRecord) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The headline metric of the last round in which clients told their own, and each client's score."""
    each: Mapping[str, Mapping[str, Any]] = newest(run.rounds, "each").get("each", {})
    told = set().union(*each.values())
    metric = next((name for name in HEADLINES if name in told), "")
    return metric, {"federated": {i: figures[metric] for i, figures in each.items() if metric in figures}}


def compare(scores: ClientScores, kind: str) -> Comparison | None:
    """One kind of model against training alone; None where no client has both scores."""
    both = [row.scores for row in scores.rows if kind in row.scores and "alone" in row.scores]
    gains = [scores.sign * (found[kind] - found["alone"]) for found in both]
    if not gains:
        return None
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Comparison(kind, len(gains), better=better, worse=worse, mean=fmean(gains), interval=_interval(gains))


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The confidence interval of a mean over clients, by Student's distribution."""
    if len(values) < FEWEST:
        return None
    from scipy.stats import t as student  # takes a second to load, which no run is to wait for before it begins

    half = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def answer(run: RunRecord, scores: ClientScores | None, *, common_model: bool) -> Answer:
    """What a reader wants to know first; `common_model`: is there one, which the run's evaluation was of?"""
    compared = [found for kind in ("federated", "personal") if scores and (found := compare(scores, kind))]
    sentences = [_common_sentence(run)] if common_model else []
    if not scores or not compared:
        return Answer("Not known: no client has trained alone", [*filter(None, sentences)], *_remedy(run))
    sentences = [*(_compared_sentence(scores, found) for found in compared), _worst_sentence(scores), *sentences]
    return Answer(_verdict(compared), [*filter(None, [*sentences, _precision(scores), _skew_remark(run, scores)])])


def _verdict(compared: Sequence[Comparison]) -> str:
    """Whether federation helped, in a few words."""
    if any(found.interval is None for found in compared):
        best = max(compared, key=lambda found: found.better)
        return f"Federation helped {best.better} of {counted(best.clients, 'client')}"
    helped = [found for found in compared if found.is_clear and found.mean > 0]
    if helped:
        how = "" if helped[0].kind == "federated" else ", once each client had gone on by itself"
        return f"Yes: federation helped {helped[0].better} of {counted(helped[0].clients, 'client')}{how}"
    if all(found.is_clear for found in compared):
        return "No: by these scores clients are better off alone"
    best = max(compared, key=lambda found: found.better)
    helped_some = f"it helped {best.better} of {counted(best.clients, 'client')}"
    return f"Not clear: {helped_some}, and the mean difference may be chance"


def _compared_sentence(scores: ClientScores, found: Comparison) -> str:
    """How much better or worse clients are off than alone."""
    both = [row.scores for row in scores.rows if found.kind in row.scores and "alone" in row.scores]
    now, alone = (fmean(values[kind] for values in both) for kind in (found.kind, "alone"))
    called = "With the federated model" if found.kind == "federated" else "After steps of their own on top of it"
    name = f"{in_words(scores.metric)} on their own held-out examples"
    spread = ""
    if found.interval:
        low, high = sorted(scores.sign * bound for bound in found.interval)
        spread = f" (95 % interval over clients {interval(scores.metric, low, high)})"
    alike = found.clients - found.better - found.worse
    return (
        f"{called} clients have {score(scores.metric, now)} {name}, alone {score(scores.metric, alone)}, in the mean: "
        f"{difference(scores.metric, now - alone)}{spread}; better for {counted(found.better, 'client')}, worse for "
        f"{found.worse}{f', alike for {alike}' if alike else ''}."
    )


def _worst_sentence(scores: ClientScores) -> str:
    """Which client is served worst, and what it would have alone."""
    kind = "federated" if "federated" in scores.kinds else "personal"
    worst = scores.worst(kind)
    alone = f", alone {score(scores.metric, worst.scores['alone'])}" if "alone" in worst.scores else ""
    return f"Served worst is {worst.name}, with {score(scores.metric, worst.scores[kind])}{alone}."


def _common_sentence(run: RunRecord) -> str:
    """What the run did for the common model, on examples that nobody trained on; empty where it was not measured."""
    after = newest(run.rounds, "eval").get("eval") or {}
    metric = next((name for name in HEADLINES if name in after), "")
    before = run.rounds[0].get("before", {}) if run.rounds else {}
    if not metric:
        return ""
    name, was = in_words(metric), f"went from {score(metric, before[metric])} to" if metric in before else "is"
    rows = run.inputs.get("data", {}).get("evaluation", 0)
    limit = run.settings.get("data.eval_limit") or rows
    some = f"at most {limit:,} of " if limit < rows else ""
    where = f" on {some}{rows:,} examples of the common evaluation" if rows else " in the common evaluation"
    return f"The common model's {name} {was} {score(metric, after[metric])}{where}."


def _precision(scores: ClientScores) -> str:
    """How exactly a client's score is known from so few examples; empty where that cannot be said."""
    counts = [row.examples for row in scores.rows if row.examples]
    if scores.metric not in ("accuracy", "exact_match") or not counts:
        return ""
    n, p = median(counts), fmean(scores.values(scores.kinds[-1]))
    half = 1.96 * sqrt(max(p * (1 - p), 0.25 / n) / n)
    return (
        f"A client has {n:.0f} held-out examples (the median), by which its score is known to about ± {100 * half:.0f} "
        "points: smaller differences of single clients say little."
    )


def _skew_remark(run: RunRecord, scores: ClientScores) -> str:
    """The caution where labels are so skewed that a client does well by knowing its most frequent one."""
    shares = [max(counts) / sum(counts) for counts in label_counts(run).values() if sum(counts)]
    if scores.metric not in SHARES or not shares or fmean(shares) < SKEWED:
        return ""
    return (
        "The clients' labels are skewed: always a client's own most frequent class would be right in "
        f"{100 * fmean(shares):.0f} % of its rows, in the mean. So these scores say how well a client is served on "
        "data like its own, and the common evaluation whether the task was learned."
    )


def label_counts(run: RunRecord) -> dict[int, list[int]]:
    """How many training rows of each class every client has; empty where that is not known, or not to be told."""
    classes: Iterable[Sequence[int]] = run.inputs.get("data", {}).get("classes", {}).values()
    return {i: list(counts) for i, counts in enumerate(zip(*classes, strict=False))}


def _remedy(run: RunRecord) -> tuple[str, str]:
    """What would give an answer, and the command for it where there is one."""
    if run.is_private and not run.settings.get("dp.metrics"):
        return (
            "Clients of a private run tell no scores of their own (dp.metrics): each site can compare by itself, "
            "on its own machine.",
            "",
        )
    if run.is_deployed:
        return "The next run answers it, with data.holdout at the clients and personal.alone = true at the server.", ""
    if run.settings.get("data.holdout"):
        return (
            "Have each client train alone, on the same data and for as many steps, and be scored on what it holds out:",
            f"fedlora simulate --resume {run.folder} --personal.alone",
        )
    return (
        "No client holds out examples of its own. Run again with data.holdout and personal.alone, and the report "
        "compares each client's federated model with what it would have had alone:",
        f"fedlora simulate --config {run.folder}/config.toml --data.holdout 0.1 --personal.alone",
    )
