"""The machine: Python, versions, what computes, memory, and the disk on which a client keeps its state."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedlora.config import Config
from fedlora.estimates.remedies import refuse_large_base
from fedlora.estimates.room import free, words

from .findings import Finding, ok, warning, wrong

LITTLE_DISK = 2e9  # bytes that a client's state, logs and the parts of jobs fill sooner or later
SHOWN = "torch", "transformers", "peft", "flwr"


def python() -> Iterator[Finding]:
    """Yield whether this Python is one that fedlora takes."""
    now = platform.python_version()
    takes = _needed_python()
    if now in SpecifierSet(takes):
        yield ok("python", f"{now} ({platform.system()}, {platform.machine()})")
    else:
        yield wrong("python", f"{now}, and fedlora takes {takes}; make a virtual environment with such a Python")


def versions() -> Iterator[Finding]:
    """Yield whether every library is of a version that was tried."""
    others = [*_other_versions()]
    if others:
        yield warning("versions", f"{'; '.join(others)}; pip install -U fedlora brings what was tried")
    else:
        yield ok("versions", ", ".join(f"{name} {version(name)}" for name in SHOWN))


def _needed_python() -> str:
    try:
        return metadata("fedlora")["Requires-Python"] or ">=3.11"
    except PackageNotFoundError:  # a checkout that was not installed
        return ">=3.11"


def _other_versions() -> Iterator[str]:
    """Yield each library that is missing, or of a version outside of the bounds."""
    try:
        needed = [Requirement(text) for text in requires("fedlora") or ()]
    except PackageNotFoundError:
        return
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            if version(requirement.name) not in requirement.specifier:
                yield f"{requirement.name} {version(requirement.name)} is outside of {requirement.specifier}"
        except PackageNotFoundError:
            yield f"{requirement.name} is not installed"


def device(config: Config) -> Iterator[Finding]:
    """Yield what a run computes on here."""
    asked = config.model.device
    if torch.cuda.is_available() and asked != "cpu":
        left, there = torch.cuda.mem_get_info()
        yield ok("device", f"{torch.cuda.get_device_name()}, {words(left)} of {words(there)} free")
    elif asked.startswith("cuda"):
        yield wrong("device", f"model.device = {asked}, and torch finds no GPU; install its driver, or set cpu")
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        yield ok("device", f"a processor with {cores} cores, of which torch takes {torch.get_num_threads()}; no GPU")


def memory(config: Config) -> Iterator[Finding]:
    """Yield whether there is memory for the base model."""
    there = free(torch.device("cpu"))
    refuse_large_base(config, there)
    yield ok("memory", f"{words(there)} free, enough to load the base model")


def disk(state: Path) -> Iterator[Finding]:
    """Yield whether a client can keep its state in this folder, and has room there."""
    place = next(path for path in (state.absolute(), *state.absolute().parents) if path.exists())
    left = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK) or (state.exists() and not state.is_dir()):
        yield wrong("disk", f"{state} cannot be written; give --state a folder of this user's")
    elif left < LITTLE_DISK:
        yield warning("disk", f"{words(left)} free at {place}; make room, or give --state a folder on another disk")
    else:
        yield ok("disk", f"{words(left)} free at {place}")
