"""Curves and bars as SVG, to stand in a page: small enough to be read at a phone's width, coloured by the page's style.

Every text goes through `xml.etree`, which escapes it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from markupsafe import Markup

WIDTH, HEIGHT = 360, 190  # of a chart, in units that are about a pixel on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26  # margins, in which the axes are labelled
COLOURS = 8  # that the style has; a ninth series takes the first again, with a dashed line
DOTS = 30  # points of a curve up to which each is marked


@dataclass(frozen=True)
class Series:
    """A curve: its name, and its points in ascending order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    title: str
    svg: Markup
    legend: Sequence[str]  # names of the series in the order of their colours; empty of one alone


@dataclass(frozen=True)
class Axis:
    """A range of numbers on a line of the picture."""

    low: float
    high: float
    start: float  # where `low` lies
    end: float  # where `high` lies

    def at(self, value: float) -> float:
        """Where a number lies, to a tenth of a unit."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def line_chart(title: str, series: Sequence[Series], written: Callable[[float], str], x: str = "round") -> Chart | None:
    """Curves over a common axis whose numbers are `written` so; None where there are no two points to join."""
    series = [s for s in series if s.points]
    if all(len(s.points) < 2 for s in series):
        return None
    across, up, ticks = _axes(series)
    root = _picture(f"{title}: {'; '.join(f'{s.name} {written(s.points[-1][1])} at the end' for s in series)}")
    for tick in ticks:
        _grid_line(root, up.at(tick), written(tick).replace(".0\u00a0%", "\u00a0%"))
    _number_rounds(root, across, x)
    for n, curve in enumerate(series):
        _curve(root, curve, across, up, n, written, x)
    legend = [s.name for s in series] if len(series) > 1 else []
    return Chart(title, _markup(root), legend)


def _axes(series: Sequence[Series]) -> tuple[Axis, Axis, list[float]]:
    """The two axes that hold all points, and the numbers to be written at the upright one."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    ticks = nice_ticks(min(ys), max(ys))
    up = Axis(ticks[0], ticks[-1], start=HEIGHT - BOTTOM, end=TOP)
    return Axis(min(xs), max(xs), start=LEFT + 4, end=WIDTH - RIGHT - 4), up, ticks


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers at equal steps, the first at or below `low` and the last at or above `high`.

    >>> nice_ticks(0.51, 0.77)
    [0.5, 0.6, 0.7, 0.8]
    >>> nice_ticks(3.0, 3.0)
    [2.5, 3.0, 3.5]
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 0.5
        low, high, count = low - pad, high + pad, 2
    rough = (high - low) / count
    unit = 10.0 ** floor(log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def _whole_ticks(axis: Axis, most: int = 6) -> Iterator[int]:
    """Yield whole numbers at equal steps along an axis of rounds, its ends among them where they are few."""
    low, high = ceil(axis.low), floor(axis.high)
    if high - low < 1:
        yield from {low, high}
        return
    step = next(n for n in _steps() if (high - low) / n <= most)
    yield from range(ceil(low / step) * step, high + 1, step)


def _steps() -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, 50 and so on."""
    unit = 1
    while True:
        yield from (unit, 2 * unit, 5 * unit)
        unit *= 10


def _picture(label: str) -> Element:
    """The root of a picture, with what it shows in words."""
    return Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT + 8}", "role": "img", "aria-label": label})


def _markup(root: Element) -> Markup:
    """The picture as text, in which every name is escaped."""
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _number_rounds(root: Element, across: Axis, x: str) -> None:
    """Label the axis at the bottom, which is of `x`."""
    for tick in _whole_ticks(across):
        _text(root, across.at(tick), HEIGHT - 10, f"{tick:g}", "middle")
    _text(root, WIDTH - RIGHT, HEIGHT + 5, x, "end")


def _grid_line(root: Element, y: float, label: str) -> None:
    SubElement(root, "line", {"x1": f"{LEFT}", "x2": f"{WIDTH - RIGHT}", "y1": f"{y}", "y2": f"{y}", "class": "grid"})
    _text(root, LEFT - 6, y + 4, label, "end")


def _text(root: Element, x: float, y: float, text: str, anchor: str) -> None:
    """Write a text whose middle or end, as `anchor` says, lies at x."""
    where = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}
    SubElement(root, "text", where).text = text


def _curve(
    root: Element, curve: Series, across: Axis, up: Axis, n: int, written: Callable[[float], str], x: str
) -> None:
    """A curve with a mark at each of its points, if they are few, that says its numbers under a pointer."""
    marks = [(across.at(px), up.at(py), px, py) for px, py in curve.points]
    dashed = " dashed" if n >= COLOURS else ""
    path = " ".join(f"{a:g},{b:g}" for a, b, _, _ in marks)
    SubElement(root, "polyline", {"points": path, "class": f"curve s{n % COLOURS}{dashed}"})
    for a, b, px, py in marks if len(marks) <= DOTS else marks[-1:]:
        dot = SubElement(root, "circle", {"cx": f"{a:g}", "cy": f"{b:g}", "r": "2.6", "class": f"dot s{n % COLOURS}"})
        SubElement(dot, "title").text = f"{curve.name}, {x} {px:g}: {written(py)}"


def bar_chart(title: str, bars: Sequence[tuple[float, float]], parts: tuple[str, str], x: str = "round") -> Chart:
    """Upright bars of two parts, one upon the other, as of clients that answered and that did not.

    `bars` holds the two parts of each, in order from 1; `parts` their names.
    """
    ticks = nice_ticks(0.0, max((a + b for a, b in bars), default=1.0))
    up = Axis(0.0, ticks[-1], start=HEIGHT - BOTTOM, end=TOP)
    across = Axis(0.5, len(bars) + 0.5, start=LEFT, end=WIDTH - RIGHT)
    root = _picture(f"{title}: in {sum(b > 0 for _, b in bars)} of {len(bars)} some {parts[1]}")
    for tick in ticks:
        _grid_line(root, up.at(tick), f"{tick:g}")
    _number_rounds(root, across, x)
    width = max(0.6, 0.8 * (across.at(2) - across.at(1)))
    for n, (first, second) in enumerate(bars, start=1):
        parts_of_bar = ((0, 0.0, first), (1, first, first + second))
        for colour, low, high in filter(lambda part: part[2] > part[1], parts_of_bar):
            said = f"{x} {n}: {high - low:g} {parts[colour]}"
            place = {
                "x": across.at(n) - width / 2,
                "y": up.at(high),
                "width": width,
                "height": up.at(low) - up.at(high),
            }
            bar = SubElement(root, "rect", {name: f"{value:g}" for name, value in place.items()})
            bar.set("class", f"bar s{colour}")
            SubElement(bar, "title").text = said
    return Chart(title, Markup(ElementTree.tostring(root, encoding="unicode")), parts)
