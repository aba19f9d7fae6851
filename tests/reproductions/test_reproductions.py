"""Experiments of papers: their settings are settings, and the verdict on a number is what its tolerance says."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli.app import app
from fedlora.comparison.schedule import Schedule
from fedlora.comparison.statistics import Interval
from fedlora.comparison.table import Row, rows
from fedlora.errors import ConfigError
from fedlora.reproductions.catalogue import PublishedCell, Reproduction, names, reproduction
from fedlora.reproductions.verdicts import verdicts

CELL = PublishedCell("fedavg", "small", value=0.9, tolerance=0.01)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """Where an experiment's data are said to lie; nothing is read."""
    return {"model.path": "org/model", "data.path": str(tmp_path / "d.jsonl"), "data.eval": str(tmp_path / "e.jsonl")}


@pytest.mark.parametrize("name", names())
def test_an_experiment_names_its_paper_its_needs_and_cells_that_its_table_has(name: str, given: dict[str, Any]) -> None:
    made = reproduction(name)
    assert "https://arxiv.org/abs/" in made.about and made.needs and made.takes and made.published
    found = made.comparison(given)
    table = {(line.name, case.name) for line in found.lines for case in found.cases}
    assert {(cell.line, cell.case) for cell in made.published} <= table
    assert all(0 < cell.tolerance < 0.1 for cell in made.published)


def test_before_any_run_no_number_is_reached(given: dict[str, Any]) -> None:
    made = reproduction("fedsvd-sst2-minilm")
    schedule = Schedule(made.comparison(given))
    assert {one.outcome for one in verdicts(made, rows(schedule, {}))} == {"not run"}


@pytest.mark.parametrize(
    ("mean", "half", "differs", "outcome"),
    [
        (0.905, None, (), "agrees"),
        (0.905, 0.05, (), "agrees"),
        (0.93, 0.01, (), "differs"),
        (0.93, 0.03, (), "open"),
        (0.93, None, (), "open"),
        (0.9, 0.001, ("a smaller model",), "not comparable"),
    ],
)
def test_a_verdict_is_what_tolerance_and_interval_say(
    mean: float, half: float | None, differs: tuple[str, ...], outcome: str
) -> None:
    made = Reproduction("x", "", "", "", differs, (), (CELL,), {})
    row = Row("fedavg", "small", {}, {}, {}, figures={"test accuracy": Interval(mean, half, 3)})
    (found,) = verdicts(made, [row])
    assert found.outcome == outcome and f"{mean:.4f}" in found.words()


def test_the_command_lists_what_there_is_and_knows_the_nearest_name() -> None:
    listed = CliRunner().invoke(app, ["reproduce"])
    assert listed.exit_code == 0 and all(f"{name}: " in listed.stdout for name in names())
    with pytest.raises(ConfigError, match='did you mean "fedsvd-sst2"'):
        reproduction("fedsvd-sst")
