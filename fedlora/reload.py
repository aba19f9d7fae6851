"""What was exported, loaded as a stranger would: by PEFT on a base that has seen nothing of the run, or as a model."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from . import base
from .config import ModelConfig
from .data import Form

SEED = 2**31 - 1  # not the run's: a head that was left out of the export is then another one


def adapter(config: ModelConfig, form: Form, folder: Path) -> nn.Module:
    """A clean base wearing the PEFT adapter in `folder`."""
    net: nn.Module = _worn(base.load(config, form, SEED)[0], folder)
    return net


def merged(config: ModelConfig, form: Form, folder: Path) -> nn.Module:
    """The whole model in `folder`."""
    net, _, _ = base.load(replace(config, path=str(folder.absolute()), revision=""), form, SEED)
    return net


def merge(config: ModelConfig, form: Form, folder: Path) -> None:
    """Put in place of the adapter in `folder` the base with the adapter in its weights, and its processor."""
    net, processor, _ = base.load(config, form, SEED)
    whole = _worn(net, folder).merge_and_unload()
    shutil.rmtree(folder)
    whole.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def _worn(net: nn.Module, folder: Path) -> Any:
    loaded: Any = PeftModel  # untyped
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT finds GPT-2's Conv1D by itself, and says so
        return loaded.from_pretrained(net, str(folder))
