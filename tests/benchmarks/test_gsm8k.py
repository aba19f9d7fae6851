"""The benchmark on GSM8K: its table, which runs are left, and that a client alone sends nothing and learns."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gsm8k import BEFORE, COMPARED, ComparedRun, SharedInputs, measure, ready, table
from tests.support.models import make


def record(models: int = 1, clients: int = 10) -> dict[str, Any]:
    rounds = [{"bytes_up": 5_000_000, "clients": clients}] * 2
    scores = {"loss": 1.25, "exact_match": 0.04, "rouge_l": 0.3, "unfinished": 0.1}
    return scores | {"asked": 100, "models": models, "rounds": rounds, "trained_cpu_seconds": 60.0}


def test_the_table_has_a_standard_error_and_no_traffic_of_a_single_client() -> None:
    results = {"FedIT": {"run": record()}, "all data in one": {"run": record(clients=1)}}
    results |= {BEFORE: {"run": record() | {"rounds": []}}, "FedSA-LoRA": {"run": record(models=10)}}
    lines = table(results).splitlines()
    assert "| before training | 1.250 | 4.0 ± 2.0 | 0.300 | 10.0 |  |  |" in lines
    assert "| FedIT | 1.250 | 4.0 ± 2.0 | 0.300 | 10.0 | 500.0 kB | 1.00 |" in lines
    assert "| FedSA-LoRA (10 models) | 1.250 | 4.0 ± 2.0 | 0.300 | 10.0 | 500.0 kB | 1.00 |" in lines
    assert "| all data in one | 1.250 | 4.0 ± 2.0 | 0.300 | 10.0 |  | 1.00 |" in lines
    assert "| FFA-LoRA | not run |  |  |  |  |  |" in lines


def test_runs_that_are_done_are_not_done_again() -> None:
    left = [variant.line for variant in ready(COMPARED, {BEFORE: {"run": record()}})]
    assert left == [variant.line for variant in COMPARED[1:]]


def test_clients_alone_learn_and_send_nothing(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    for name, count in (("train", 40), ("test", 10)):
        rows = [{"question": f"w{i % 9} w{i % 7}", "answer": f"w{i % 5} 1 #### {i % 5}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = SharedInputs(str(tmp_path / "model"), str(tmp_path), threads=1, smoke=True)
    before = measure(place, COMPARED[0])
    alone = measure(place, ComparedRun("alone", {"strategy": "benchmarks.gsm8k:Local", "train.lr": 0.05}))
    assert alone["models"] == 10 and alone["asked"] == before["asked"] == 10
    assert [r["bytes_up"] for r in alone["rounds"]] == [0] and alone["loss"] != before["loss"]
