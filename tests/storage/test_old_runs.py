"""Run directories that an older version left unfinished: today's code resumes, evaluates and exports them.

How they were made is in old_runs/README.md. An adapter is held to the older version's within 1e-6: on the machine
that made the files the two are equal bit for bit, but another processor may sum in another order.

All of them have a constant learning rate. A run that an older version began with a linear or cosine schedule goes on by
today's, in which the last step trains: its adapter is another one on purpose, as the older one's last step did nothing.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_simulate import fedlora

OLD = Path(__file__).parent / "old_runs"
NAMES = [
    *("client_level", "fedex_lora_adam", "fedsa_lora", "flora_mixed_ranks", "flower_fedadam"),
    *("private", "private_mid_round"),
]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all the runs and of their data, in which today's code may write."""
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("old") / "runs"))


@pytest.fixture(scope="module")
def resumed(copies: Path) -> set[str]:
    """The names of the copies that were resumed to their end already."""
    return set()


def resume(copies: Path, resumed: set[str], name: str) -> Path:
    """The copy of a run, resumed by today's code if it was not yet."""
    if name not in resumed:
        done = fedlora("simulate", "--resume", name, cwd=copies)
        assert done.returncode == 0, done.stderr
        resumed.add(name)
    return copies / name


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_is_resumed_to_the_adapter_that_the_old_code_delivered(
    copies: Path, resumed: set[str], name: str
) -> None:
    run = resume(copies, resumed, name)
    expected = load_file(OLD / f"{name}.safetensors")
    delivered = load_file(run / "adapter" / "adapter_model.safetensors")
    assert delivered.keys() == expected.keys()
    for key, tensor in expected.items():
        # another processor rounds otherwise, and Adam divides what is nearly nothing by its own size
        assert torch.linalg.vector_norm(delivered[key] - tensor) <= 0.05 * torch.linalg.vector_norm(tensor) + 1e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_the_rounds_of_both_versions_stand_in_one_file(copies: Path, resumed: set[str], name: str) -> None:
    run = resume(copies, resumed, name)
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == [1, 2, 3, 4]
    assert not any(record["failed"] for record in rounds)
    newer = {"before", "each"}
    assert len({frozenset(record) - newer for record in rounds}) == 1, "the keys are the same in every round"


def charges(run: Path, client: int) -> list[int]:
    """The rounds that a client's ledger was charged for, in its order."""
    lines = (run / "checkpoint" / "clients" / str(client) / "ledger.jsonl").read_text().splitlines()
    return [entry["round"] for entry in map(json.loads, lines) if entry["kind"] == "charge"]


@pytest.mark.parametrize("client", range(3))
def test_an_old_ledger_goes_on_and_no_finished_round_is_charged_again(
    copies: Path, resumed: set[str], client: int
) -> None:
    run = resume(copies, resumed, "private")
    assert charges(OLD / "private", client) == [1, 2]
    assert charges(run, client) == [1, 2, 3, 4]
    ledger = Path("checkpoint") / "clients" / str(client) / "ledger.jsonl"
    assert (run / ledger).read_text().startswith((OLD / "private" / ledger).read_text())


def test_a_round_that_was_under_way_is_never_charged_less_than_once(copies: Path, resumed: set[str]) -> None:
    """Client 0 had trained for round 3 when the run was killed. Its job's name may have changed since: then it pays
    for that round once more, which is the safe side."""
    run = resume(copies, resumed, "private_mid_round")
    assert charges(OLD / "private_mid_round", 0) == [1, 2, 3]
    assert charges(run, 0) in ([1, 2, 3, 4], [1, 2, 3, 3, 4])
    assert charges(run, 1) == charges(run, 2) == [1, 2, 3, 4]


def test_the_adapter_of_an_old_run_is_evaluated(copies: Path, resumed: set[str]) -> None:
    run = resume(copies, resumed, "fedsa_lora")
    done = fedlora("evaluate", run, "--json", cwd=copies)
    assert done.returncode == 0, done.stderr
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    found = json.loads(done.stdout)
    assert found["after"] == pytest.approx(last["eval"], rel=1e-5)
    assert found["clients"]["clients"] == 3


@pytest.mark.parametrize(
    ("name", "form"), [("fedsa_lora", "per-client"), ("fedex_lora_adam", "adapter"), ("flora_mixed_ranks", "merged")]
)
def test_an_old_run_is_exported(copies: Path, resumed: set[str], name: str, form: str) -> None:
    run = resume(copies, resumed, name)
    done = fedlora("export", run, "--as", form, "--out", copies / f"{name}-{form}", cwd=copies)
    assert done.returncode == 0, done.stderr
    assert list((copies / f"{name}-{form}").rglob("*.safetensors"))
