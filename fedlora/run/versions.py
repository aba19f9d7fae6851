"""The versions of what a run's numbers rest on."""

import platform
from importlib.metadata import PackageNotFoundError, version

PARTS = "fedlora", "opacus", "torch", "transformers", "peft", "flwr", "cryptography"


def versions() -> dict[str, str]:
    """Return the version of fedlora, of the libraries that it computes with, and of Python, by name."""
    return {name: _version(name) for name in PARTS} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
