"""A run directory, damaged in any of its files, gives the same run again or says in one sentence why it does not.

Every file and every damage: tests/deploy/damaged_files.py.
"""

import json
import re
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora import CheckpointError, ConfigError, simulate
from fedlora.config import read
from fedlora.run.directory import RunDirectory, _figures
from fedlora.storage import checkpoint
from fedlora.strategy import load
from tests.support.damage import damaged_copy
from tests.support.small_run import Outcome, begin, outcome, resume, site


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    return begin(place, place / "begun")


@pytest.fixture(scope="module")
def undisturbed(begun: Path, place: Path) -> Outcome:
    return outcome(resume(Path(shutil.copytree(begun, place / "undisturbed"))))


@pytest.fixture
def copy(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("run", "random"),
        ("config.toml", "emptied"),
        ("rounds.jsonl", "random"),
        ("rounds.jsonl", "emptied"),
        ("checkpoint/round-000003.safetensors", "head"),
        ("checkpoint/clients/0/kept-000002.safetensors", "one bit"),
        ("checkpoint/clients/0/kept-000002.safetensors", "deleted"),
        ("checkpoint/clients/1/left-000002.safetensors", "deleted"),
        ("adapter/README.md", "random"),
        ("adapter/README.md", "folder"),
    ],
)
def test_a_damaged_run_is_resumed_to_the_same_run(
    name: str, how: str, begun: Path, undisturbed: Outcome, tmp_path: Path
) -> None:
    assert outcome(resume(damaged_copy(begun, tmp_path / "run", name, how))) == undisturbed


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("config.toml", "folder", r"config\.toml .* could not be written: Is a directory; .*: remove that folder"),
        ("rounds.jsonl", "folder", r"rounds\.jsonl cannot be read: Is a directory; remove it, and resume"),
        ("run", "folder", r"run .* could not be written: Is a directory; .*: remove that folder"),
    ],
)
def test_or_it_says_in_one_sentence_what_to_do(name: str, how: str, says: str, begun: Path, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=says) as error:
        resume(damaged_copy(begun, tmp_path / "run", name, how))
    assert "\n" not in str(error.value)


def test_settings_of_which_a_part_is_lost_are_those_of_the_checkpoint(copy: Path) -> None:
    """Wherever the file is cut off, in the middle of a number too."""
    toml, whole = copy / "config.toml", RunDirectory(copy).config()
    content = toml.read_bytes()
    for end in range(len(content) - 1):
        toml.write_bytes(content[:end])
        assert RunDirectory(copy).config() == whole, content[:end][-20:]


def test_settings_that_the_finished_rounds_rest_on_cannot_be_edited(copy: Path) -> None:
    toml = copy / "config.toml"
    toml.write_text(toml.read_text().replace("lr = 0.05", "lr = 0.06"))
    with pytest.raises(ConfigError, match=r"config\.toml has train\.lr = 0\.06, and the finished rounds had 0\.05"):
        resume(copy)
    toml.unlink()
    assert [record["round"] for record in resume(copy).rounds] == [1, 2, 3, 4]
    assert read(toml)["train.lr"] == 0.05


def test_an_empty_config_is_no_run_of_the_default_settings(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"config\.toml is empty; put it back"):
        RunDirectory(tmp_path).config()


def test_a_run_that_is_older_than_a_setting_goes_on_as_it_began(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("rounds = 3\n")
    settings = RunDirectory(tmp_path).config()
    assert (settings["data.split"], settings["data.template"]) == ("sample", "plain")
    assert settings["model.class_order"] == "data"


def test_settings_of_the_server_may_be_edited(copy: Path) -> None:
    toml = copy / "config.toml"
    toml.write_text(toml.read_text().replace("patience = 0", "patience = 9"))
    assert len(resume(copy).rounds) == 4 and read(toml)["server.patience"] == 9


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_in_silence(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl has 3 rounds, and .*checkpoint has no checkpoint"):
        resume(copy)


def test_a_round_that_neither_file_of_an_older_run_has_is_missed(copy: Path) -> None:
    """The checkpoints of older versions have no record but their own."""
    load("fedsa_lora")
    last = checkpoint.latest(copy / "checkpoint")
    assert last is not None
    checkpoint.save(copy / "checkpoint", replace(last, earlier=None))
    lines = (copy / "rounds.jsonl").read_text().splitlines(keepends=True)
    (copy / "rounds.jsonl").write_text(lines[0] + lines[1][:20] + lines[2])
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl is damaged: round 2 is missing"):
        RunDirectory(copy).resume_point()
    (copy / "rounds.jsonl").write_text(lines[0] + lines[1] + lines[1] + lines[2])  # as two writers once left it
    past = RunDirectory(copy).resume_point()
    assert past is not None and len(past.losses) == 3
    assert (copy / "rounds.jsonl").read_text() == "".join(lines)


def moved(place: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A site of its own, and two rounds of a run there."""
    here = Path(shutil.copytree(place, tmp_path / "site", ignore=shutil.ignore_patterns("begun", "undisturbed")))
    return here, begin(here, tmp_path / "run", rounds=2)


def test_data_that_changed_since_the_run_began_are_refused(place: Path, tmp_path: Path) -> None:
    here, run = moved(place, tmp_path)
    rows = here / "client_1.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("w3", "w4"))
    with pytest.raises(ConfigError, match=r"data\.path client_1\.jsonl is not what it was when the run in .* began"):
        resume(run)
    rows.write_text(text)
    assert len(resume(run).rounds) == 4


def test_a_base_model_that_changed_since_the_run_began_is_refused(place: Path, tmp_path: Path) -> None:
    """One number of one matrix; a run is not resumed, evaluated or exported over it."""
    here, run = moved(place, tmp_path)
    weights = here / "model" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "embed" in name)
    tensors[name].view(-1)[3] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.path model\.safetensors is not what it was"):
        resume(run)


def test_two_runs_that_start_in_one_second_have_a_directory_each(place: Path, monkeypatch: Any, tmp_path: Path) -> None:
    from fedlora import api

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api.time, "strftime", lambda _: "20260131-120000")
    made = [api._unused("fedsa_lora") for _ in range(3)]
    assert len({*made}) == 3 and all(folder.is_dir() for folder in made)


def test_a_run_directory_has_one_writer(copy: Path) -> None:
    with RunDirectory(copy).only_writer(), pytest.raises(ConfigError, match="another fedlora is at work in"):
        resume(copy)
    assert len(resume(copy).rounds) == 4


def test_no_curves_are_no_reason_to_end_a_run(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(copy / "tensorboard")
    (copy / "tensorboard").touch()
    assert len(resume(copy).rounds) == 4 and "no curves are kept" in caplog.text


def test_a_run_that_is_refused_leaves_no_directory(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        simulate(model=place / "model", data=place / "client_*.jsonl", clients=5, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_records_of_a_run_are_read_whatever_stands_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_bytes(b'{"round": 1}\n{"round": 2, "why": "\xff"}\n3\n{"round": 3}\n')
    assert [record["round"] for record in RunDirectory(tmp_path).records()] == [1, 2]
    for line in ("null", "{}", "[]", "[" * 100_000, json.dumps({"round": "1"})):
        (tmp_path / "rounds.jsonl").write_text(f"{line}\n")
        assert RunDirectory(tmp_path).records() == []


def test_an_adapter_is_put_in_place_whole(copy: Path) -> None:
    """Files of others that lie beside it stay."""
    (copy / "adapter" / "notes.txt").write_text("mine")
    before = load_file(copy / "adapter" / "adapter_model.safetensors")
    resume(copy)
    after = load_file(copy / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    assert (copy / "adapter" / "notes.txt").read_text() == "mine" and not list(copy.glob(".adapter*"))


def test_a_resumed_run_counts_what_was_before_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the rounds before took and what was measured before training, at its start; all seconds at its end."""
    lines = [json.loads(line) for line in (copy / "rounds.jsonl").read_text().splitlines()]
    lines[0]["seconds"] = 1000.0
    (copy / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    last = next(checkpoint.newest_first(copy / "checkpoint"))
    checkpoint.save(copy / "checkpoint", replace(last, earlier=lines[:-1]))
    simulate(resume=copy, rounds=4)
    said = capsys.readouterr().out
    taken = re.search(r"so far: 3 rounds in (\d+) s, [\d.]+ kB up, [\d.]+ kB down", said)
    before = re.search(r"before training: .*perplexity ([\d.]+)", said)
    whole = re.search(r"^4 rounds in (\d+) s", said, re.MULTILINE)
    assert taken and whole and int(whole[1]) >= int(taken[1]) >= 1000
    assert before and float(before[1]) == pytest.approx(lines[0]["before"]["perplexity"], rel=1e-3)


def test_a_run_says_in_one_file_what_it_is(begun: Path) -> None:
    about = json.loads((begun / "run.json").read_text())
    assert (about["strategy"], about["seed"], about["run"]) == ("fedsa_lora", 0, RunDirectory(begun).run)
    assert about["settings_sha256"] == sha256((begun / "config.toml").read_bytes()).hexdigest()
    assert about["versions"]["torch"] == torch.__version__ and about["earlier_versions"] == []


def test_a_run_that_goes_on_keeps_when_it_began_and_with_which_versions(copy: Path) -> None:
    about = json.loads((copy / "run.json").read_text())
    old = {**about["versions"], "torch": "2.0.0"}
    (copy / "run.json").write_text(json.dumps({**about, "versions": old}))
    for rounds in (4, 5):
        resume(copy, rounds)
    again = json.loads((copy / "run.json").read_text())
    assert (again["begun"], again["earlier_versions"], again["versions"]) == (about["begun"], [old], about["versions"])


def test_every_clients_own_figures_are_curves(begun: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(begun / "tensorboard")).Reload()
    drawn = [event.value for event in curves.Scalars("each/train_loss/1")]
    records = RunDirectory(begun).records()
    assert drawn == pytest.approx([record["each"]["1"]["train_loss"] for record in records])


def test_of_more_than_fifty_clients_no_curves_are_drawn() -> None:
    record = {"round": 1, "each": {str(i): {"train_loss": 1.0} for i in range(51)}}
    assert _figures(record) == {}
