"""Asynchronous rounds, measured: the bias is found where it is, and the small form prints both tables."""

import sys
from pathlib import Path

import pytest

from benchmarks import asynchronous
from benchmarks.asynchronous import TimedRun, TimePlace, settles_at, time_to, timed, times
from benchmarks.smoke import inputs


def test_the_bias_towards_quick_clients_is_measured_and_corrected() -> None:
    plain, weighed = (settles_at(2, 100, 50, staleness=a) for a in (0.0, 0.5))
    assert weighed > plain > 0.8
    assert settles_at(2, 100, 50, staleness=0.0, fair=True) == pytest.approx(0.5, abs=0.15)
    assert settles_at(1, 20, 10, mode="rounds") == pytest.approx(0.5)


def test_the_time_to_an_accuracy_is_the_first_at_which_it_is_there() -> None:
    course = [[10.0, 0.1], [20.0, 0.4], [30.0, 0.3], [40.0, 0.5]]
    assert time_to(course, 0.3) == 20.0 and time_to(course, 0.5) == 40.0 and time_to(course, 0.6) is None


def test_the_small_form_times_modes_beside_each_other(tmp_path: Path) -> None:
    model, data = inputs("classify", tmp_path)
    place = TimePlace(model, data, small=True)
    done = timed(place, TimedRun("async, fair", 0))
    assert done["used"] == 10 and 0 < done["quick"] < 1 and sum(n for _, n in done["ages"]) == 10
    table = times({"rounds": {"seed 0": done | {"ages": [], "quick": None}}, "async, fair": {"seed 0": done}})
    assert "| rounds |" in table and "| async, fair |" in table


def test_without_a_model_there_is_the_bias_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["asynchronous"])
    monkeypatch.setattr(asynchronous, "bias", lambda small: f"the first table, {small}")
    asynchronous.main()
    assert capsys.readouterr().out == "the first table, False\n"
