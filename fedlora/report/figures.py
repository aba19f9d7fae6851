"""Numbers as a report writes them, with their units."""

from math import isfinite
from typing import Any

SHARES = {  # metrics between 0 and 1, told in per cent
    *("accuracy", "micro_f1", "macro_f1", "token_accuracy", "subset_accuracy"),
    *("exact_match", "token_f1", "rouge_l", "unfinished"),
}
NOTHING = "–"


def is_number(value: Any) -> bool:
    """Is it a finite number, as a figure can have?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def in_words(metric: str) -> str:
    """The name of a metric for people.

    >>> in_words("macro_f1"), in_words("token_accuracy")
    ('macro-F1', 'token accuracy')
    """
    return metric.replace("_f1", "-F1").replace("rouge_l", "ROUGE-L").replace("_", " ")


def score(metric: str, value: Any) -> str:
    r"""A value of a metric with its unit.

    >>> score("accuracy", 0.8125), score("perplexity", 29.2801), score("accuracy", None)
    ('81.2\xa0%', '29.28', '–')
    """
    if not is_number(value):
        return NOTHING
    return f"{100 * value:.1f}\u00a0%" if metric in SHARES else f"{value:.4g}"


def difference(metric: str, value: Any) -> str:
    r"""A difference of two values of a metric, with its sign and unit.

    >>> difference("accuracy", -0.0512), difference("perplexity", 2.0)
    ('−5.1\xa0points', '+2')
    """
    if not is_number(value):
        return NOTHING
    text = f"{100 * value:+.1f}\u00a0points" if metric in SHARES else f"{value:+.3g}"
    return text.replace("-", "−").replace("+0.0\u00a0", "0.0\u00a0")


def interval(metric: str, low: float, high: float) -> str:
    r"""Two differences as the ends of an interval, with the unit once.

    >>> interval("accuracy", -0.195, 0.053)
    '−19.5 to +5.3\xa0points'
    """
    start = difference(metric, low).removesuffix("\u00a0points")
    return f"{start} to {difference(metric, high)}"


def duration(seconds: float) -> str:
    """A time in the units that people read.

    >>> duration(8.04), duration(754), duration(40_000)
    ('8.0 s', '12.6 min', '11.1 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def runs_of(numbers: list[int]) -> str:
    """Whole numbers in ascending order, neighbours drawn together.

    >>> runs_of([2, 5, 6, 7, 9])
    '2, 5–7, 9'
    """
    groups: list[list[int]] = []
    for n in sorted(numbers):
        if groups and n == groups[-1][-1] + 1:
            groups[-1].append(n)
        else:
            groups.append([n])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}–{g[-1]}" for g in groups)
