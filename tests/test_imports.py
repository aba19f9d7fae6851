"""The direction of imports, which is the architecture: a list of layers, each of which knows only those before it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("fedlora", "server", "client", "strategies", "simulations")
LAYERS = (  # from the ground up; packages that share a line do not know each other
    {"fedlora"},  # the vocabulary: the files beside the packages
    {"fedlora.storage", "fedlora.data"},
    {"fedlora.encoding"},
    {"fedlora.strategies", "fedlora.messages", "fedlora.models", "fedlora.deployment"},
    {"fedlora.kernels"},
    {"fedlora.privacy"},
    {"fedlora.run"},
    {"fedlora.report"},
    {"fedlora.server", "fedlora.client"},
    {"fedlora.server.deployment", "fedlora.client.deployment", "fedlora.client.stacked"},
    {"fedlora.simulations"},
    {"fedlora.checks"},
    {"fedlora.audit", "fedlora.comparison", "fedlora.estimates"},
    {"fedlora.doctor"},
    {"fedlora.reproductions"},
    {"fedlora.api"},  # a run as a function, which the command shares
    {"fedlora.cli"},
    {"fedlora.__main__", "fedlora.server.app", "fedlora.client.app"},  # what others start or import
)
FOREIGN = {  # library -> the only packages and modules that know it
    "flwr": ("fedlora.messages", "fedlora.server", "fedlora.client", "fedlora.simulations.flower"),
    "ray": ("fedlora.simulations.flower",),
    "peft": ("fedlora.models",),
    "transformers": (
        "fedlora.models",
        "fedlora.kernels",
        "fedlora.encoding.chat",
        "fedlora.run.setup",
        "fedlora.checks",
    ),
    "flwr_datasets": ("fedlora.data.partition",),
    "opacus": ("fedlora.privacy",),
    "pandas": ("fedlora.run.frames",),
    "typer": ("fedlora.cli",),
    "lm_eval": ("fedlora.run.harness",),
}


def module(path: Path) -> str:
    """The name under which a file is imported."""
    parts = [*([] if path.parts[0] == "fedlora" else ["fedlora"]), *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(p): p for p in (f.relative_to(ROOT) for d in FOLDERS for f in sorted((ROOT / d).rglob("*.py")))}


def package(name: str) -> str:
    """The package a module lies in; a package's own `__init__` lies in itself."""
    return name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]


@cache
def imports(name: str) -> frozenset[str]:
    """Modules that a module names, lazily or not, relative ones made absolute."""
    return frozenset(_imports(name))


def _imports(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / FILES[name]).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = package(name).split(".")
            above = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names)


def layer(name: str) -> int:
    """How high a module stands."""
    known = {member: floor for floor, members in enumerate(LAYERS) for member in members}
    return known[name] if name in known and name != "fedlora" else known[package(name)]


OURS = sorted(name for name in FILES if name != "fedlora")


@pytest.mark.parametrize("name", OURS)
def test_imports_point_downwards(name: str) -> None:
    for other in imports(name) & set(OURS):
        assert package(other) == package(name) or layer(other) < layer(name), f"{name} imports {other}"


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: imports(name) & set(OURS) for name in OURS}).prepare()


@pytest.mark.parametrize(("side", "other"), [("server", "client"), ("client", "server")])
def test_server_and_client_never_import_each_other(side: str, other: str) -> None:
    for name in (n for n in OURS if n.startswith(f"fedlora.{side}")):
        assert not [i for i in imports(name) if i.startswith(f"fedlora.{other}")], name


@pytest.mark.parametrize("name", OURS)
def test_each_library_is_known_by_few(name: str) -> None:
    for other in imports(name):
        knows = FOREIGN.get(other.split(".")[0])
        assert knows is None or name.startswith(knows), f"{name} imports {other}"


@pytest.mark.parametrize("name", [n for n in OURS if n.startswith("fedlora.strategies.")])
def test_a_strategy_knows_the_algebra_and_the_messages_alone(name: str) -> None:
    ours = {i for i in imports(name) if i.startswith("fedlora")}
    assert ours <= {"fedlora.lora", "fedlora.mixed_ranks", "fedlora.seeds", "fedlora.strategy", "fedlora.errors"}


def test_a_client_knows_no_algorithm() -> None:
    for name in (n for n in OURS if n.startswith("fedlora.client")):
        assert not {"fedlora.strategy", "fedlora.strategies"} & imports(name), name


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, fedlora.__main__; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LOADS = """
import sys
import {first}
assert not {not_yet} & set(sys.modules), {not_yet} & set(sys.modules)
import {then}
assert not {never} & set(sys.modules), {never} & set(sys.modules)
"""


@pytest.mark.parametrize(("first", "not_yet", "then", "never"), [
    ("fedlora.server.deployment.supervisor", {"torch"}, "fedlora.errors", {"torch"}),
    ("fedlora.api", {"transformers", "peft"}, "fedlora.server.run, fedlora.run.setup", {"opacus", "datasets"}),
], ids=["a server's command", "a run before its first line"])  # fmt: skip
def test_libraries_are_loaded_by_who_needs_them(first: str, not_yet: set[str], then: str, never: set[str]) -> None:
    """They take seconds each; a run that is not private never loads Opacus, nor one of embedded data the datasets."""
    code = LOADS.format(first=first, not_yet=not_yet, then=then, never=never)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
