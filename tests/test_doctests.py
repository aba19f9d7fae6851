"""The examples in docstrings come to what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIDES = ("server", "client", "strategies", "simulations")
FOLDERS = {"fedlora": "fedlora", **{f"fedlora.{name}": name for name in SIDES}}


def _with_examples() -> list[str]:
    """The modules of which a docstring has an example."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return found


@pytest.mark.parametrize("module", _with_examples())
def test_the_examples_of_a_module_come_to_what_they_say(module: str) -> None:
    ended = doctest.testmod(import_module(module))
    assert ended.attempted and not ended.failed
