"""A real pretrained encoder on real, label-skewed text; skipped where they are not."""

import json
from pathlib import Path

import pytest

from tests.cli.test_simulate import fedlora

NUMBERS = 2 * 6 * 8 * (384 + 384) + 384 * 2 + 2  # r = 8 on query and value of six layers of width 384, and the head


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "fedex_lora"])
def test_sst2s_six_clients_train_minilm(strategy: str, real_data: Path, minilm: Path, tmp_path: Path) -> None:
    run = Path(__file__).parents[2] / "simulations" / "sst2.toml"
    words = [
        "--config",
        run,
        "--model",
        minilm,
        "--data",
        real_data / "sst2" / "client_*.jsonl",
        "--strategy",
        strategy,
    ]
    words += ["--eval-data", real_data / "sst2" / "val.jsonl", "--data.eval_limit", "32", "--data.limit", "64"]
    done = fedlora("simulate", *words, "--rounds", "1", "--train.steps", "1", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "rounds.jsonl").read_text())
    sent = NUMBERS - 2 * 6 * 8 * 384 * (strategy == "ffa_lora")  # FFA-LoRA's A stays where it is
    assert record["clients"] == record["answered"] == 6
    assert record["bytes_up"] == 6 * 4 * sent and record["bytes_down"] == 6 * 4 * NUMBERS
