"""Distance to the limit: the small form runs and finds that engines agree; operations are those of real tokens."""

import sys
from pathlib import Path

import pytest

from benchmarks import limit, smoke
from benchmarks.limit import part_of, tasks_of, useful_operations
from fedlora import config as configuration
from fedlora.run.setup import prepare


def test_the_small_form_finds_that_engines_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["limit", "--smoke"])
    limit.main()
    out = capsys.readouterr().out
    assert "| serial |" in out and "| stacked |" in out


def test_useful_operations_do_not_depend_on_how_rows_are_batched(tmp_path: Path) -> None:
    model, data = smoke.inputs("classify", tmp_path)
    named = {"model.path": model, "data.path": f"{data}/train.csv", "clients": 2, "cohort": 2, "train.steps": 2}
    counts = set()
    for size, accumulate in ((4, 1), (2, 2)):
        batches = {"train.batch_size": size, "train.accumulate": accumulate}
        setup = prepare(configuration.build(limit.SETTINGS, named, batches))
        counts.add(useful_operations(setup.model, tasks_of(setup)))
    assert len(counts) == 1 and counts.pop() > 0


def test_operations_are_told_apart() -> None:
    assert part_of("aten::addmm") == "products" and part_of("aten::bmm") == "small products"
    assert part_of("aten::native_layer_norm") == "norms" and part_of("something") == "everything else"
