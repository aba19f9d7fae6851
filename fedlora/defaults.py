"""The settings of a run that names neither model nor data: the embedded one's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import Config, build, read

EMBEDDED = (
    Path(__file__).parent / "tiny" / "run.toml"
)  # the settings of the small model and text that come with fedlora


def over_defaults(file: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The file's settings under those of the command line; with no model and no data, both over the embedded run's."""
    embedded = not any(layer.get(key) for layer in (file, given) for key in ("model.path", "data.path"))
    under = read(EMBEDDED) if embedded else {}
    return build(under, file, given)
