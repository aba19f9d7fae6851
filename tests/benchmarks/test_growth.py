"""Growth: one small run is measured from outside, and becomes a table and a plot."""

from pathlib import Path

from benchmarks import smoke
from benchmarks.growth import SETTINGS, plot, run, table, write_rows


def test_a_run_is_measured_drawn_and_tabled(tmp_path: Path) -> None:
    model, _ = smoke.inputs("classify", tmp_path)
    write_rows(tmp_path / "rows.csv", 40)
    files = {"data.path": tmp_path / "rows.csv", "model.path": model, "clients": 2, "cohort": 2, "rounds": 2}
    cell = {"clients": 2, "rank": 8} | run({**SETTINGS, **files, "engine": "serial"}, tmp_path / "run")
    assert cell["wall"] > cell["round"] > 0 and cell["start"] > 0
    plot({"clients": [cell], "rank": [cell]}, tmp_path / "growth.svg")
    assert "by rank" in (tmp_path / "growth.svg").read_text() or (tmp_path / "growth.svg").stat().st_size > 5000
    assert table({"clients": [cell]}).splitlines()[2].startswith("| 2 | 8 | ")
