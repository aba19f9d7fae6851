"""The file of results: every run that is done, by a name that follows from its settings and files.

So lines can be added, and the table be made otherwise, without a run being done again; and a run whose data changed is
another one. The file is replaced whole after each run, so that a process that is killed leaves what was done.
"""

import json
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedlora import config as configuration
from fedlora.config import MOVABLE, Config
from fedlora.errors import ConfigError
from fedlora.storage.files import write_durably

FORMAT = 1
NO_MATTER = {*MOVABLE, "threads", "workers", "ray", "model.device", "data.cache"}  # in which equal runs may differ
Results = dict[str, dict[str, Any]]  # a run's name -> its settings and record


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a run that are not the defaults, so that a setting that comes later changes no name."""
    defaults, flat = _defaults(), configuration.flatten(config)
    return {key: flat[key] for key in sorted(flat) if key not in NO_MATTER and flat[key] != defaults.get(key, ...)}


@cache
def _defaults() -> Mapping[str, Any]:
    return configuration.flatten(Config())


def run_name(config: Config, baseline: str) -> str:
    """The name of a run: a hash of all that its record follows from."""
    parts = [baseline or "strategy", settings_of(config), _files(*_places(config))]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _places(config: Config) -> tuple[str, ...]:
    return (
        config.model.path,
        config.data.path,
        config.data.eval,
        config.lora.init_data,
        config.simulation.trace,
    )


@cache
def _files(model: str, data: str, evaluation: str, init: str, trace: str) -> dict[str, str]:
    """The hash of every file that runs with these paths read."""
    from fedlora.run.run_files import file_hashes

    layer = {"model.path": model, "data.path": data, "data.eval": evaluation, "lora.init_data": init}
    config = configuration.build(layer, {"simulation.trace": trace})
    return file_hashes(config, base=model, reads_library=not data)


def load(path: Path) -> Results:
    """The results in the file, without the runs that failed, which are tried again; none where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        runs: Results = found["runs"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is no file of a comparison's results; give --out another one") from e
    is_of = found.get("format")
    if is_of != FORMAT:
        raise ConfigError(f"{path} has format {is_of}, and this version reads {FORMAT}; give another --out")
    return {name: run for name, run in runs.items() if not is_failed(run)}


def is_failed(run: Mapping[str, Any]) -> bool:
    """Has the run come to an error that another try may not come to?"""
    return "error" in run["record"] and not is_diverged(run)


def is_diverged(run: Mapping[str, Any]) -> bool:
    """Did training come to no number, as it may with too high a rate?"""
    return bool(run["record"].get("diverged"))


def save(path: Path, results: Results) -> None:
    """Write the results, a line for each run, so that at any moment the file is whole. Raises `CheckpointError`."""
    lines = [f"  {json.dumps(name)}: {json.dumps(run, separators=(',', ':'))}" for name, run in results.items()]
    body = ",\n".join(lines)
    write_durably(path, f'{{\n "format": {FORMAT},\n "runs": {{\n{body}\n }}\n}}\n'.encode())
