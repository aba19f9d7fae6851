"""Waiting threads sleep in every process that fedlora starts, unless whoever starts it wants it otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora
from fedlora.deployment.processes import Process

ROOT = Path(__file__).parents[1]
TELL = [sys.executable, "-c", "import os; print(os.environ['OMP_WAIT_POLICY'])"]


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP, which says it otherwise")
def test_a_command_does_not_spin_while_it_waits() -> None:
    """Its OpenMP library says how often it spins, as it has taken that in when it was loaded."""
    env = os.environ | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    del env["OMP_WAIT_POLICY"]
    done = subprocess.run([sys.executable, "-m", "fedlora", "strategies"], env=env, capture_output=True, text=True)
    assert "GOMP_SPINCOUNT = '0'" in done.stderr


def test_a_notebook_does_not_either_if_fedlora_is_what_loads_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert fedlora.LoRA and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_process_of_a_deployment_does_not_unless_its_user_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said, wanted in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY") if said is None else monkeypatch.setenv("OMP_WAIT_POLICY", said)
        process = Process("child", TELL, tmp_path / wanted)
        process.start()
        process.wait(60)
        assert process.log_tail() == wanted


@pytest.mark.parametrize("side", ["server", "client"])
def test_an_image_says_it_for_whatever_runs_in_it(side: str) -> None:
    assert "OMP_WAIT_POLICY=PASSIVE" in (ROOT / side / "Dockerfile").read_text()
