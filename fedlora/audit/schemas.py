"""What the records of an audit are to look like: as the run's data, or without any as the model's own task."""

import json
from pathlib import Path

from fedlora.config import Config
from fedlora.data import federated
from fedlora.data.schema import Schema
from fedlora.models.base_model import TINY

TASKS = {"ForSequenceClassification": "classify", "ForImageClassification": "image"}


def of(config: Config) -> Schema:
    """The form of the run's data; of a model by itself, that of what it was made for, if its folder says so."""
    if config.data.path:
        return federated.load(config.data, config.model.task, clients=config.clients, seed=config.seed).form
    told = _told(config.model.path)
    classes = [task for end, task in TASKS.items() for name in told.get("architectures", ()) if name.endswith(end)]
    task = config.model.task if config.model.task != "auto" else (*classes, "lm")[0]
    if task == "lm":
        return Schema("text", ("text",))
    numbered = told.get("id2label", {"0": "no", "1": "yes"})  # left out where there are two without names
    names = config.data.labels or tuple(str(numbered[k]) for k in sorted(numbered, key=int))
    return Schema("image" if task == "image" else "label", ("image" if task == "image" else "text", "label"), names)


def _told(path: str) -> dict[str, dict[str, str]]:
    """The model's configuration, where it is a folder."""
    file = Path(path or TINY).expanduser() / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
