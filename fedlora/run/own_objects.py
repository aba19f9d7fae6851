"""Data and models that a caller of `fedlora.simulate` holds in memory, kept in the run directory to be found again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from fedlora import config as configuration
from fedlora.config import SHORT, Config
from fedlora.data.own_rows import is_rows, write_rows
from fedlora.errors import ConfigError

FOLDER = "given"  # below the run directory
ROWS = {"data.path": "data", "data.eval": "evaluation"}  # what rows may stand for, and how their files are called
HELD = "held in memory"  # stands for a path until the files are written


@dataclass(frozen=True, eq=False)
class OwnObjects:
    """What a caller gives as objects in place of paths, by the setting's key; and the tokenizer of a model."""

    by_key: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None

    def keep(self, folder: Path, config: Config) -> Config:
        """Write the objects below the folder; return the settings with their paths."""
        rmtree(folder / FOLDER, ignore_errors=True)  # of a run that ended before its first round
        paths = {key: str(self._kept(key, value, folder / FOLDER)) for key, value in self.by_key.items()}
        if "data.path" in paths and Path(paths["data.path"]).is_dir() and config.data.partition == "auto":
            paths["data.partition"] = "files"
        return configuration.build(configuration.flatten(config), paths)

    def _kept(self, key: str, value: Any, folder: Path) -> Path:
        if key in ROWS:
            return write_rows(value, folder, ROWS[key])
        path = folder / "model"
        for part in (value, self.tokenizer):
            part.save_pretrained(path)
        return path


def separate(settings: Mapping[str, Any], tokenizer: Any = None) -> tuple[OwnObjects, dict[str, Any]]:
    """The objects among the settings, which may stand in a section too, and the settings with a word in their place.

    Raises `ConfigError` for an object where none may stand, and for a model that could not be loaded again.
    """
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        plain |= _by_key(name, value)
    objects = {key: value for key, value in plain.items() if _is_object(key, value)}
    for key, value in objects.items():
        _check(key, value, tokenizer)
    if tokenizer is not None and "model.path" not in objects:
        raise ConfigError("tokenizer goes with a model that is given as an object; a folder has its own")
    return OwnObjects(objects, tokenizer), plain | dict.fromkeys(objects, HELD)


def _by_key(name: str, value: Any) -> dict[str, Any]:
    """A setting, or those of a section, by the dotted key."""
    if isinstance(value, Mapping) and not is_rows(value):
        return {f"{name}.{key}": inner for key, inner in value.items()}
    return {SHORT.get(name, name): value}


def _is_object(key: str, value: Any) -> bool:
    return is_rows(value) or (key == "model.path" and _is_net(value))


def _is_net(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "parameters")


def _check(key: str, value: Any, tokenizer: Any) -> None:
    """Raise `ConfigError` where this object cannot stand for this setting."""
    if is_rows(value):
        if key not in ROWS:
            raise ConfigError(f"{key} is given rows, which it does not take; data and eval_data do")
        return
    if not hasattr(value, "save_pretrained"):
        raise ConfigError(f"the model is a {type(value).__name__}, and a run takes one of transformers")
    if hasattr(value, "peft_config"):
        raise ConfigError("the model has an adapter of PEFT; give the base model, or merge_and_unload() it first")
    if not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError("a model that is given as an object needs its tokenizer (or image processor): tokenizer=...")
