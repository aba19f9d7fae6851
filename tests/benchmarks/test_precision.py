"""The benchmark of precisions: its table, and that its runs differ in nothing but the precision."""

from pathlib import Path

from benchmarks.precision import SMOKE, measure, planned, table
from tests.support.models import make


def test_the_table_compares_runs_of_the_same_seed() -> None:
    results = {
        "machine": {"capability": "AVX2"},
        "sst2 0 fp32": {"accuracy": 80.0, "cpu_seconds": 30.0},
        "sst2 1 fp32": {"accuracy": 82.0, "cpu_seconds": 30.0},
        "sst2 0 mixed": {"accuracy": 79.0, "cpu_seconds": 10.0},
        "sst2 1 mixed": {"accuracy": 81.5, "cpu_seconds": 15.0},
    }
    lines = table(results).splitlines()
    assert lines[2:] == ["| sst2 | fp32 | 81.00 | +0.00 | 1.00 |", "| sst2 | mixed | 80.25 | -0.75 (too far) | 2.50 |"]


def test_a_run_has_an_accuracy_and_a_time(tmp_path: Path) -> None:
    make("bert", tmp_path / "model")
    rows = "".join(f"w{i % 9} w{i % 7},{'ab'[i % 2]}\n" for i in range(60))
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    common = {"model.path": str(tmp_path / "model"), "threads": 1, **SMOKE}
    for run in planned(["banking77"], 1, ["mixed"]):
        found = measure(run, str(tmp_path), common)
        assert 0 <= found["accuracy"] <= 100
        assert found["cpu_seconds"] > 0
