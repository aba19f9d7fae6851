"""What trackers are told, each by its own library and without a network: `make test-trackers` has them all."""

import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora import Result, simulate
from fedlora.config import build, flatten
from fedlora.errors import ConfigError
from fedlora.run.trackers import OPENERS, TrackedRun, Trackers, check_trackers, may_be_told
from tests.support.small_run import begin, site


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site(tmp_path_factory.mktemp("secret-place"))


class Kept:
    """A tracker that keeps what it is told, until it fails."""

    def __init__(self, run: TrackedRun) -> None:
        self.told: list[tuple[int, Mapping[str, float]]] = []

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if step == 2:
            raise ConnectionError("gone\naway")
        self.told.append((step, figures))

    def close(self) -> None:
        self.told.append((-1, {}))


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(TrackedRun("r", tmp_path, {}))
    monkeypatch.setitem(OPENERS, "kept", lambda run: kept)  # type: ignore[arg-type]
    trackers = Trackers(("kept", "tensorboard"), TrackedRun("r", tmp_path, {}))
    for step in (1, 2, 3):
        trackers.log({"train_loss": 1.0, "each/loss/3": 2.0}, step)
    trackers.close()
    assert kept.told == [(1, {"train_loss": 1.0})], "of a single client nothing is told, and after a failure nothing"
    assert caplog.messages == ["no curves are kept by kept from here on: gone away"]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(("name", "says"), [("wndb", 'did you mean "wandb"?'), ("none", "is no tracker")])
def test_a_tracker_that_there_is_not_is_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_trackers([name])


def test_a_library_that_is_not_there_is_named_before_a_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.run.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report_to = trackio needs its library: pip install 'fedlora\[trackio\]'"):
        simulate(model="no/such/model", report_to="trackio", out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_no_setting_with_a_path_or_a_column_is_told() -> None:
    given = {"model.path": "/secret/m", "data.path": "/secret/d", "data.text": "diagnosis", "dp.ledger": "/secret/l"}
    given |= {"lora.init_data": "/secret/i", "strategy": "/secret/mine.py", "train.lr": 0.5, "client.code": "secret"}
    told = may_be_told(flatten(build(given)))
    assert told["train.lr"] == 0.5 and told["strategy"] == "mine.py" and told["lora.rank"] == 8
    assert not [key for key, value in told.items() if "secret" in str(value) or value == "diagnosis"]


def test_a_run_that_reports_to_nobody_has_no_curves(place: Path, tmp_path: Path) -> None:
    assert not (begin(place, tmp_path / "run", rounds=1, report_to="") / "tensorboard").exists()


def tracked(place: Path, out: Path, name: str) -> tuple[Result, dict[str, Any]]:
    """A run of two rounds, resumed to a third, and the figures of its rounds that every tracker must have."""
    begin(place, out, strategy="fedavg", rounds=2, report_to=f"tensorboard,{name}")
    result = simulate(resume=out, rounds=3, progress=False)
    return result, {record["round"]: record["eval"]["loss"] for record in result.rounds}


@pytest.mark.optional_library("trackio")
def test_trackio_has_the_figures_of_every_round(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _, losses = tracked(place, tmp_path / "run", "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("fedlora", (tmp_path / "run" / "run").read_text().strip())
    assert {log["step"]: log["eval/loss"] for log in logs if log["step"]} == pytest.approx(losses)
    assert_tells_no_secret(tmp_path / "trackio")


@pytest.mark.optional_library("wandb")
def test_weights_and_biases_has_the_figures_and_nothing_of_this_machine(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _, losses = tracked(place, tmp_path / "run", "wandb")
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    sent = b"".join(file.read_bytes() for file in files)
    assert len(files) == 2 and all(repr(loss).encode() in sent for loss in losses.values())
    for folder in {file.parent for file in files}:  # its logs/ stay here
        shutil.rmtree(folder / "logs")
        assert_tells_no_secret(folder)


@pytest.mark.optional_library("mlflow")
def test_mlflow_has_the_figures_of_every_round_in_one_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _, losses = tracked(place, tmp_path / "run", "mlflow")
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fedlora").experiment_id])
    history = {figure.step: figure.value for figure in client.get_metric_history(run.info.run_id, "eval/loss")}
    assert {step: loss for step, loss in history.items() if step} == pytest.approx(losses)
    assert run.data.params["train.lr"] == "0.05" and run.info.status == "FINISHED"
    assert_tells_no_secret(tmp_path / "mlruns")


def assert_tells_no_secret(folder: Path) -> None:
    """Nothing that is kept for others names where the run's model and data lie, nor this machine."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        kept = path.read_bytes()
        assert b"secret-place" not in kept, path
        assert socket.gethostname().encode() not in kept, path
