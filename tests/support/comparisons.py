"""A small comparison: a tiny classifier, three clients' files and a test split."""

import json
from pathlib import Path
from typing import Any

from fedlora.comparison import settings
from fedlora.comparison.settings import Comparison
from tests.support.models import make

SMALL: dict[str, Any] = {
    "rounds": 2,
    "cohort": 3,
    "threads": 1,
    "lora.rank": 2,
    "train.steps": 2,
    "train.batch_size": 4,
    "train.lr": 0.05,
    "data.holdout": 0.4,
    "data.split": "sample",  # as many rows of each client
    "data.label": "label",
}


def job(folder: Path) -> dict[str, Any]:
    """The settings of a run on a tiny model and data, which are made in the folder."""
    for i in range(4):
        rows = ({"text": f"w{j % 7} w{(i + j) % 5} w{j % 3}", "label": str((i + j) % 3)} for j in range(30))
        name = f"client_{i}.jsonl" if i < 3 else "test.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"data.path": f"{folder}/client_*.jsonl", "data.eval": f"{folder}/test.jsonl"}
    return {"model.path": str(make("bert", folder / "model")), **paths, **SMALL}


def comparison(given: dict[str, Any], **tree: Any) -> Comparison:
    """A comparison with these settings of all runs, and what a file would say besides."""
    return settings.comparison(tree, given, Path())
