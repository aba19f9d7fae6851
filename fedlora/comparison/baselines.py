"""The two lines with which every comparison begins: what there would be without a federation.

alone   Every client trains by itself for as many steps as it would in all rounds, from the pretrained model.
pooled  All clients' training rows are in one place, and one model is trained on them on as many batches as all clients
        see in all rounds together: what a federation may hope for.

Both have the whole course of the learning rate in one go, an optimizer that is not made anew, and no noise, as nothing
leaves a client. What is about the server or the way to it has no meaning for them and is left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedlora.config import Config
from fedlora.sections import Training

BASELINES = ("alone", "pooled")
NOT_THEIRS = ("option.", "dp.", "secure.", "messages.", "aggregate.", "simulation.", "personal.", "server.")


def baseline_settings(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a baseline, of those that a line has: those that have a meaning for it."""
    kept = {key: value for key, value in flat.items() if not key.startswith(NOT_THEIRS)}
    kept |= {"strategy": "fedavg", "lora.ranks": ""}
    return {key: value for key, value in kept.items() if (key, value) != ("model.head", "local")}


def pooled_training(config: Config, clients: int) -> Training:
    """How one model is trained on all rows: as many batches as all clients have in all rounds."""
    asked = config.rounds * config.cohort
    training = config.train
    return replace(training, steps=asked * training.steps, epochs=training.epochs * asked / clients)
