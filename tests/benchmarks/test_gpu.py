"""The GPU's benchmark in its small form, on a CPU: every way of training is in the table."""

import sys

import pytest

from benchmarks import gpu


def test_the_small_form_runs_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--clients", "2"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| bfloat16 | 16 |") for line in lines) == 3


def test_without_a_gpu_the_command_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU here" in capsys.readouterr().err
