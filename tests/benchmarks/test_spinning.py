"""Spinning: every policy is measured in a process of its own, and tabled."""

import json
from pathlib import Path

import pytest

from benchmarks import spinning


def test_a_policy_is_measured_and_tabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spinning, "POLICIES", {"PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}})
    spinning.main(["--smoke", "--out", str(tmp_path / "spinning.json")])
    [run] = json.loads((tmp_path / "spinning.json").read_text())["runs"]
    assert run["wall"] > 0 and run["cpu"] > 0 and "| PASSIVE | 0" in capsys.readouterr().out
