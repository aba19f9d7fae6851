"""The schema of an audit's records: that of the run's data, or without data that of the model's own task."""

import json
from pathlib import Path
from typing import Any

from fedlora.config import Config
from fedlora.data import federated
from fedlora.data.schema import Schema
from fedlora.models.source import TINY

TASKS = {"ForSequenceClassification": "classify", "ForImageClassification": "image"}
WITHOUT_CLASSES = {
    "lm": Schema("text", ("text",)),
    "seq2seq": Schema("response", ("prompt", "response")),
    "regression": Schema("label", ("text", "label"), target="number"),
}
PROBLEMS = {"regression": "regression", "multi_label_classification": "multilabel"}


def schema_of(config: Config) -> Schema:
    """Return the schema of the run's data; without data, that of the task that the model was made for."""
    if config.data.path:
        return federated.load(config.data, config.model.task, clients=config.clients, seed=config.seed).schema
    about = _about(config.model.path)
    task = config.model.task if config.model.task != "auto" else _task(about)
    if task in WITHOUT_CLASSES:
        return WITHOUT_CLASSES[task]
    labels = config.data.labels or _labels(about)
    if task == "image":
        return Schema("image", ("image", "label"), labels)
    return Schema("label", ("text", "label"), labels, "labels" if task == "multilabel" else "class")


def _about(path: str) -> dict[str, Any]:
    """Return the model's configuration; empty for a model that is no folder here."""
    file = Path(path or TINY).expanduser() / "config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _task(about: dict[str, Any]) -> str:
    """Return the task that the model's class is for."""
    if about.get("problem_type") in PROBLEMS:
        return PROBLEMS[about["problem_type"]]
    for name in about.get("architectures", ()):
        for end, task in TASKS.items():
            if name.endswith(end):
                return task
    return "seq2seq" if about.get("is_encoder_decoder") else "lm"


def _labels(about: dict[str, Any]) -> tuple[str, ...]:
    numbered = about.get("id2label", {"0": "no", "1": "yes"})  # left out for two classes without names
    return tuple(str(numbered[key]) for key in sorted(numbered, key=int))
