"""The notebooks: each runs from its first cell to its last, with smaller settings in its cell of parameters."""

import json
import sys
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALLER = {  # in place of what the cells of parameters say
    "compare_three_strategies": """
STRATEGIES, SEEDS = ("fedavg", "ffa_lora"), (0,)
SMALL = {"clients": 3, "cohort": 2, "rounds": 1, "threads": 1, "train": {"steps": 1, "batch_size": 2}}
SMALL["data"] = {"holdout": 0.2, "eval_limit": 2, "holdout_limit": 1, "limit": 12}
""",
    "your_own_strategy": """
POWERS = (0.5,)
SMALL = {"clients": 3, "cohort": 2, "rounds": 1, "threads": 1, "train": {"steps": 1, "batch_size": 2}}
SMALL["data"] = {"eval_limit": 2, "limit": 9}
""",
    "your_own_training": """
SMALL = {"cohort": 3, "rounds": 2, "threads": 1, "train": {"steps": 1, "batch_size": 2}, "progress": False}
""",
}


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells with code."""
    found = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in found["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any], name: str) -> str:
    """What a cell holds; in place of the parameters smaller ones."""
    return SMALLER[name] if "parameters" in cell["metadata"].get("tags", ()) else "".join(cell["source"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run = ModuleType("cells")
    monkeypatch.setitem(sys.modules, "cells", run)
    with chdir(tmp_path):
        for number, cell in enumerate(cells(notebook)):
            exec(compile(source(cell, notebook.stem), f"{notebook.name}, code cell {number}", "exec"), run.__dict__)


def test_there_are_three_and_each_has_its_parameters() -> None:
    assert {path.stem for path in NOTEBOOKS} == {*SMALLER}
    for notebook in NOTEBOOKS:
        assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells(notebook)) == 1
        assert json.loads(notebook.read_text())["nbformat"] == 4
