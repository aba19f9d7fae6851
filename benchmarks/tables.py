"""Tables in Markdown, and the figures in their cells."""

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def starred(value: float, grid: Sequence[float]) -> str:
    """The value, with a star at an end of its grid."""
    return f"{value:g}{'*' if value in (min(grid), max(grid)) else ''}"


def percent(share: float) -> str:
    """A share in percent, with one digit after the point."""
    return f"{100 * share:.1f}"
