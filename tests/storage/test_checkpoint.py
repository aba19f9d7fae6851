"""What is written is whole, and comes back as it was."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch

from fedlora.errors import CheckpointError
from fedlora.lora import LoRA
from fedlora.storage import checkpoint
from fedlora.storage.checkpoint import Checkpoint
from fedlora.storage.client_state import ClientState
from fedlora.tensors import file_bytes
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


def header(path: Path) -> tuple[int, bytes]:
    """The bytes of a checkpoint's header, and where they end."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return end, content


def test_whatever_bit_of_a_header_is_turned_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    """Digits are turned into digits, so that the header stays JSON of another meaning."""
    for n in (1, 2):
        checkpoint.save(tmp_path, Checkpoint(n, STATE, {"round": n, "eval": {"loss": 1.25}}, earlier=[]))
    newest = tmp_path / "round-000002.safetensors"
    end, whole = header(newest)
    draw = Random(0)
    for place in draw.sample([i for i in range(8, end) if chr(whole[i]).isdecimal()], 60):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        back = checkpoint.latest(tmp_path)
        assert back is not None and back.round == 1, whole[place - 20 : place + 20]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "random": lambda content: Random(0).randbytes(len(content)),
    "another head": lambda content: b"\x07" * 16 + content[16:],
    "no metadata": lambda content: file_bytes({"000000": torch.zeros(2)}, {}),
    "no tree": lambda content: file_bytes({}, {"round": "2", "tree": "null"}),
    "a tree without an end": lambda content: file_bytes({}, {"round": "2", "tree": "[" * 100_000}),
    "an unknown kind": lambda content: content.replace(b"namedtuple", b"namedtuplf"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_told(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in (1, 2):
        checkpoint.save(tmp_path, Checkpoint(n, STATE, {}))
    newest = tmp_path / "round-000002.safetensors"
    newest.write_bytes(DAMAGE[how](newest.read_bytes()))
    back = checkpoint.latest(tmp_path)
    assert back is not None and back.round == 1 and "round-000002" in caplog.text


def test_where_every_checkpoint_is_damaged_that_is_one_sentence(tmp_path: Path) -> None:
    for n in (1, 2):
        checkpoint.save(tmp_path, Checkpoint(n, STATE, {}))
    (tmp_path / "round-000001.safetensors").write_bytes(b"")
    (tmp_path / "round-000002.safetensors").unlink()
    (tmp_path / "round-000002.safetensors").mkdir()
    with pytest.raises(
        CheckpointError, match=r"round-000002.* cannot be read: .*; no checkpoint is left: put one back"
    ):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_holds_the_rounds_before_and_what_the_run_was_begun_with(tmp_path: Path) -> None:
    earlier, begun_with = [{"round": 1, "eval": {"loss": float("inf")}}], {"run": "x", "settings": {"seed": 3}}
    checkpoint.save(tmp_path, Checkpoint(2, STATE, {"round": 2}, earlier=earlier, begun_with=begun_with))
    back = checkpoint.latest(tmp_path)
    assert back is not None and back.earlier == earlier and back.begun_with == begun_with
    assert checkpoint.begun_with(tmp_path) == begun_with


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


@pytest.mark.parametrize("name", ["kept", "left"])
def test_what_a_client_kept_and_is_gone_is_told(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ClientState(tmp_path, name)
    for round in (0, 1):
        store.keep(round, factors(round).only("B"))
    assert store.is_whole(2)
    (tmp_path / f"{name}-000001.safetensors").unlink()
    assert not store.is_whole(2) and store.is_whole(1)
    assert torch.equal(store.before(2).B["q"], factors(0).B["q"])
    assert f"{name}-000001.safetensors is missing or damaged" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"[1, 2", b"3", b"\xff\xfe"])
def test_a_damaged_list_of_what_was_kept_changes_nothing(content: bytes | None, tmp_path: Path) -> None:
    store = ClientState(tmp_path)
    for round in (0, 1):
        store.keep(round, factors(round).only("B"))
    listed = tmp_path / "kept.json"
    listed.unlink() if content is None else listed.write_bytes(content)
    assert store.is_whole(2) and torch.equal(store.before(2).B["q"], factors(1).B["q"])
