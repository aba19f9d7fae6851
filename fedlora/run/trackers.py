"""Trackers of experiments, to which a run reports its figures: TensorBoard, Trackio, Weights & Biases and MLflow.

Each is a library of its own, and keeps what it is told, and finds its secrets, where it always does. The files of
TensorBoard lie in the run directory and have every figure. The others, which may send what they are told to another
machine, are told the figures of the whole federation, and the settings that name neither a path nor a column: nothing
of a single client, no host, no code, and nothing that the run prints.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedlora.errors import ConfigError, nearest

PROJECT = "fedlora"  # under which the runs are found, unless the library's own variable names another
OF_ONE_CLIENT = "each/"  # begins the name of a figure of a single client
TOLD: Sequence[str] = (
    *("strategy", "clients", "rounds", "cohort", "seed", "engine", "exactness", "precision"),
    *("model.task", "model.dtype", "model.quantize", "model.head", "model.max_length"),
    *("data.partition", "data.holdout", "data.limit"),
)
TOLD_SECTIONS = ("option.", "lora.", "train.", "server.", "aggregate.", "personal.", "messages.", "dp.", "secure.")
UNTOLD = ("lora.init_data", "dp.ledger")  # paths, in these sections
log = logging.getLogger("fedlora")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its figures."""

    name: str  # the same however often the run is resumed
    folder: Path
    settings: Mapping[str, Any]  # by dotted keys; those that may be told


class Tracker(Protocol):
    """Where figures of a run go."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a round."""

    def close(self) -> None:
        """Have everything written."""


class Trackers:
    """The trackers of one run. One that fails is left out from then on, with a warning: curves are no reason to end."""

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        self._open = {name: tracker for name in names if (tracker := _begun(name, run))}

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Have every tracker take the figures of a round."""
        for name, tracker in list(self._open.items()):
            told = figures if name == "tensorboard" else _of_the_federation(figures)
            if not _does(name, partial(tracker.log, told, step)):
                del self._open[name]

    def close(self) -> None:
        """Have every tracker write what it has not written yet."""
        for name, tracker in self._open.items():
            _does(name, tracker.close)


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker that there is not, or whose library is not installed."""
    for name in names:
        if name not in OPENERS:
            raise ConfigError(f"report_to = {name} is no tracker; {nearest(name, OPENERS)}")
        if find_spec(name) is None:
            raise ConfigError(f"report_to = {name} needs its library: pip install 'fedlora[{name}]'")


def may_be_told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that say how it was computed, and name neither a path nor a column of the data."""
    told = {
        key: v for key, v in settings.items() if key in TOLD or (key.startswith(TOLD_SECTIONS) and key not in UNTOLD)
    }
    return told | {"strategy": Path(str(settings["strategy"])).name} if "strategy" in settings else told


def _of_the_federation(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not name.startswith(OF_ONE_CLIENT)}


def _begun(name: str, run: TrackedRun) -> Tracker | None:
    """The tracker of this name, ready; none, with a warning, where it cannot be had."""
    found: list[Tracker] = []
    _does(name, lambda: found.append(OPENERS[name](run)))
    return found[0] if found else None


def _does(name: str, act: Callable[[], object]) -> bool:
    """Whether a tracker did something; else a warning says why."""
    try:
        act()
    except Exception as e:  # each library, and the network below it, has kinds of its own
        said = " ".join(str(e).split())[:200] or type(e).__name__
        log.warning("no curves are kept by %s from here on: %s", name, said)
        return False
    return True


class TensorBoard:
    """TensorBoard's files in the run directory."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter  # untyped
        self._writer = writer(str(run.folder / "tensorboard"))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures at once."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Trackio:
    """Trackio's database of this user, or a server or Space where TRACKIO_SERVER_URL or TRACKIO_SPACE_ID names one."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self._library: Any = trackio
        self._library.init(project=project, name=run.name, config=dict(run.settings), resume="allow", **quiet)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand the figures over."""
        self._library.log(dict(figures), step=step)

    def close(self) -> None:
        """Wait until they are written."""
        self._library.finish()


class WeightsAndBiases:
    """A run of Weights & Biases: on its server, or with WANDB_MODE=offline in `wandb/` here, to be sent later."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        library: Any = wandb
        untold = {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "host": PROJECT}
        untold |= {"disable_git": True, "disable_code": True, "x_save_requirements": False, "console": "off"}
        self._run: Any = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.name,
            resume="allow",
            config=dict(run.settings),
            settings=library.Settings(**untold),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand the figures over."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """Wait until they are sent."""
        self._run.finish()


class MLflow:
    """A run of MLflow, on the server or in the folder of MLFLOW_TRACKING_URI; the same one when it is resumed."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.tracking import MlflowClient

        client: Any = MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else client.create_experiment(project)
        begun = client.search_runs([number], f"tags.fedlora_run = '{run.name}'")
        if begun:
            self._id = begun[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(number, run_name=run.name, tags={"fedlora_run": run.name}).info.run_id
            for key, value in run.settings.items():
                client.log_param(self._id, key, str(value))
        self._client = client

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand the figures over."""
        for name, value in figures.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """Say that the run has ended."""
        self._client.set_terminated(self._id)


OPENERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
