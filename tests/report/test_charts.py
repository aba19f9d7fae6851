"""The pictures of a report."""

from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.report.charts import Series, bar_chart, line_chart, nice_ticks
from tests.report.test_page import Tags

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)
NAMES = st.text(max_size=20, alphabet=st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z")))


@given(NUMBERS, NUMBERS)
def test_ticks_are_few_rise_and_hold_what_is_drawn(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


@settings(max_examples=12)
@given(st.lists(st.tuples(NAMES, st.lists(NUMBERS, min_size=2, max_size=5)), min_size=1, max_size=10), NAMES)
def test_a_chart_is_well_formed_whatever_its_names_and_numbers(curves: list[tuple[str, list[float]]], x: str) -> None:
    series = [Series(name, list(enumerate(values))) for name, values in curves]
    chart = line_chart("title", series, "{:.3g}".format, x)
    assert chart is not None
    root = ElementTree.fromstring(chart.svg)
    assert len([e for e in root if e.tag == "polyline"]) == len(curves)
    assert {tag for tag, _ in Tags.of(chart.svg).found} <= {"svg", "line", "text", "polyline", "circle", "title"}


def test_one_point_makes_no_curve() -> None:
    assert line_chart("title", [Series("one", [(1.0, 2.0)]), Series("none", [])], str) is None


def test_bars_are_as_high_as_their_parts_together() -> None:
    root = ElementTree.fromstring(bar_chart("clients", [(3.0, 1.0), (4.0, 0.0)], ("answered", "failed")).svg)
    bars = [e for e in root if e.tag == "rect"]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert len(bars) == 3 and abs(heights[0] + heights[1] - heights[2]) < 0.2
