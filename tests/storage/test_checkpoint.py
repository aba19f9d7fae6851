"""What is written is whole, and comes back as it was."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fedlora.errors import CheckpointError
from fedlora.lora import LoRA
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.storage.client_state import ClientState
from tests.support.adapters import factors


class State(NamedTuple):
    lora: LoRA
    parts: tuple[LoRA, ...]
    turn: int
    notes: dict[str, float | None]


STATE = State(factors(1), (factors(2), factors(3)), 4, {"a": 0.1, "b": None})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, Checkpoint(3, STATE, {"round": 3, "eval": {"loss": 1.5}}))
    back = checkpoint.latest(tmp_path)
    assert back is not None and back.round == 3 and back.record == {"round": 3, "eval": {"loss": 1.5}}
    assert isinstance(back.state, State) and back.state.turn == 4 and back.state.notes == STATE.notes
    assert torch.equal(back.state.parts[1].A["q"], STATE.parts[1].A["q"])


def test_a_torn_file_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for n in (1, 2):
        checkpoint.save(tmp_path, Checkpoint(n, STATE, {}))
    newest = tmp_path / "round-000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    back = checkpoint.latest(tmp_path)
    assert back is not None and back.round == 1


def test_two_rounds_are_kept(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        checkpoint.save(tmp_path, Checkpoint(n, STATE, {}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000002.safetensors", "round-000003.safetensors"]


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None


def test_a_state_that_is_no_plain_value_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="builtins:object"):
        checkpoint.save(tmp_path, Checkpoint(1, object(), {}))


def test_a_checkpoint_names_no_type_that_the_run_has_not_defined(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="os:_Environ"):
        checkpoint._unpack(["dataclass", "os:_Environ", {}], {})


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the full disk: the kernel refuses the write in the same place."""
    checkpoint.save(tmp_path / "checkpoint", Checkpoint(1, STATE, {}))
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from fedlora.storage import checkpoint; from fedlora.storage.checkpoint import Checkpoint; import torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "checkpoint.save(Path(sys.argv[1]), Checkpoint(2, torch.zeros(100_000), {}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "checkpoint")], capture_output=True, text=True, check=False
    )
    assert "CheckpointError" in done.stderr and f"--resume {tmp_path}" in done.stderr
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["round-000001.safetensors"]


def test_a_round_done_again_starts_from_what_was_kept_before_it(tmp_path: Path) -> None:
    store = ClientState(tmp_path)
    for round in (0, 1, 2):
        store.keep(round, factors(round).only("B"))
    assert torch.equal(store.before(2).B["q"], factors(1).B["q"])
    assert torch.equal(store.before(3).B["q"], factors(2).B["q"])
    assert not ClientState(tmp_path / "new").before(5)
