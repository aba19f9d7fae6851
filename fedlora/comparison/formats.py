"""The table as people and programs read it: columns of words, Markdown, LaTeX, CSV and JSON."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import StringIO
from itertools import chain
from typing import Any

from fedlora.run.console import size

from .statistics import WITHIN, Interval
from .table import Row

MEANS = {"test": "test {}", "clients' own": "own mean", "worst client": "own worst"}  # column -> figure
ONES = {
    "off the mean": ("exactness", ".1e"),
    "epsilon": ("epsilon", ".2f"),
    "up": ("bytes_up", "bytes"),
    "down": ("bytes_down", "bytes"),
    "CPU s": ("cpu", ".0f"),
}
ALWAYS = ("strategy", "test")  # columns of every table
SHARES = ("accuracy", "macro_f1", "micro_f1", "subset_accuracy", "token_accuracy")  # shown in percent
LATEX = {**{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX["\\"] = r"\textbackslash{}"


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The head of the rows' table, and their cells; columns that no row fills are left out."""
    filled = {title: [cell(row) for row in rows] for title, cell in _columns(rows).items()}
    kept = {title: column for title, column in filled.items() if title in ALWAYS or any(column)}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """What a row has in each column."""
    metric = next((row.metric for row in rows if row.metric), "accuracy")
    tuned = dict.fromkeys(chain.from_iterable(row.tuned for row in rows))
    against = next((row.against for row in rows if row.against), "")
    return {
        "strategy": lambda row: row.line,
        **{key: partial(_tuned, key=key) for key in tuned},
        **{title: partial(_mean, key=key.format(metric), metric=metric) for title, key in MEANS.items()},
        f"from {against}": _difference,
        **{title: partial(_one, key=key, form=form) for title, (key, form) in ONES.items()},
        "seeds": lambda row: "" if len(row.records) in (0, row.wanted) else f"{len(row.records)} of {row.wanted}",
    }


def _tuned(row: Row, *, key: str) -> str:
    if row.why_not or key not in row.tuned:
        return ""
    value = row.tuned[key]
    return (f"{value:g}" if isinstance(value, int | float) else str(value)) + row.marks.get(key, "")


def _mean(row: Row, *, key: str, metric: str) -> str:
    """A mean over seeds, or in the first of these columns why there is none."""
    if row.why_not and key == MEANS["test"].format(metric):
        return row.why_not
    return with_interval(row.figures[key], share=metric in SHARES) if key in row.figures else ""


def with_interval(value: Interval, *, share: bool) -> str:
    """A mean and its interval; a share in percent."""
    factor, digits = (100, 1) if share else (1, 4)
    half = "" if value.half is None else f" ± {factor * value.half:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{half}"


def _difference(row: Row) -> str:
    """The difference from the line that rows are compared with, with a star where it is more than chance."""
    if row.difference is None or row.p is None:
        return ""
    factor, digits = (1, 4) if row.metric not in SHARES else (100, 1)
    mean, half = (factor * number for number in row.difference[:2])
    return f"{mean:+.{digits}f} ± {half:.{digits}f}{'*' if row.p < WITHIN else ''}"


def _one(row: Row, *, key: str, form: str) -> str:
    """A mean over seeds without its interval."""
    if key not in row.figures:
        return ""
    mean = row.figures[key].mean
    return size(round(mean)) if form == "bytes" else f"{mean:{form}}"


def metrics(rows: Sequence[Row]) -> str:
    """Which metric the table shows, and its unit, in a sentence; empty where there is no figure."""
    shown = dict.fromkeys(row.metric for row in rows if row.metric)
    told = [f"{metric.replace('_', ' ')} in per cent" if metric in SHARES else metric for metric in shown]
    return f"Shown is {', '.join(told)}." if told else ""


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each case."""
    return {case: [row for row in rows if row.case == case] for case in dict.fromkeys(row.case for row in rows)}


def markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown for each case."""
    return "\n\n".join(chain.from_iterable(_markdown(case, part) for case, part in by_case(rows).items()))


def _markdown(case: str, part: Sequence[Row]) -> Iterator[str]:
    if case:
        yield f"{case}:"
    head, body = cells(part)
    lines: Iterable[Sequence[str]] = [head, ["---"] * len(head), *body]
    yield "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def latex(rows: Sequence[Row]) -> str:
    """A tabular for each case, by the lines of the package booktabs."""
    return "\n\n".join(_latex(case, part) for case, part in by_case(rows).items())


def _latex(case: str, part: Sequence[Row]) -> str:
    head, body = cells(part)
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (head, *body)]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    comment = [f"% {case}"] if case else []
    return "\n".join(
        [*comment, begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
    )


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def comma_separated(rows: Sequence[Row]) -> str:
    """A line for each row with its numbers as they are: of every figure the mean, and half of its interval."""
    flat = [_flat(row) for row in rows]
    out = StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(chain.from_iterable(flat))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"line": row.line, "case": row.case, "seeds": len(row.records), **row.tuned}
    for name, value in row.figures.items():
        found |= {name: value.mean, f"{name} +-": value.half}
    if row.difference:
        one = row.difference
        found |= {
            "against": row.against,
            "difference": one.mean,
            "difference +-": one.half,
            "p": one.p,
            "p Holm": row.p,
        }
    return found | {"why not": row.why_not}


def as_json(rows: Sequence[Row]) -> str:
    """All rows with their numbers as they are."""
    return json.dumps([row.record() for row in rows])


PRINTED: Mapping[str, Callable[[Sequence[Row]], str]] = {  # the table's forms for programs and papers
    "json": as_json,
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
}
