"""The direction of imports, which is the architecture."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ANY = ("fedlora",)
FOLDERS = ("server", "client", "strategies", "simulations", "checks", "audit")
FOREIGN = {  # a runtime or a library of models -> the only files that know it
    "flwr": {
        "fedlora/messages/codec.py",
        "fedlora/messages/envelope.py",
        "server/upload_checks.py",
        "server",
        "client",
        "simulations/flower.py",
    },
    "ray": {"simulations/flower.py"},
    "peft": {"fedlora/models/model.py", "fedlora/models/adapter.py", "fedlora/models/peft_files.py"},
    "transformers": {
        "fedlora/models/base_model.py",
        "fedlora/cli/simulate.py",
        "benchmarks/pretrain.py",
        "fedlora/data/encoding.py",
        "checks",
    },
    "flwr_datasets": {"fedlora/data/partition.py"},
}
EDGE = {
    "fedlora/cli/simulate.py",
    "fedlora/run/setup.py",
    "fedlora/run/compose.py",
    "fedlora/strategy.py",
    "fedlora/cli/app.py",
    "fedlora/cli/operate.py",
    "fedlora/config.py",
    "simulations/flower.py",
    "checks",
    "audit",
}  # they put a run together


def files() -> list[Path]:
    return [p.relative_to(ROOT) for folder in ("fedlora", *FOLDERS) for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file names, lazily or not, relative ones made absolute."""
    package = "fedlora" if path.parts[0] == "fedlora" else f"fedlora.{path.parts[0]}"
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}." if node.level else ""
            module = f"{base}{node.module or ''}".rstrip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names if node.module is None or module == "fedlora")


@pytest.mark.parametrize("path", files(), ids=str)
def test_imports_point_inward(path: Path) -> None:
    folder = path.parts[0]
    for name in imports(path):
        outward = [f for f in FOLDERS if name.startswith(f"fedlora.{f}") and f != folder]
        assert not outward or str(path) in EDGE or folder in EDGE, f"{path} imports {name}"


@pytest.mark.parametrize("path", files(), ids=str)
def test_each_library_is_known_by_few(path: Path) -> None:
    for name in imports(path):
        knows = FOREIGN.get(name.split(".")[0])
        assert knows is None or str(path) in knows or path.parts[0] in knows, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in files() if p.parts[0] == "strategies"], ids=str)
def test_a_strategy_knows_the_algebra_and_the_messages_alone(path: Path) -> None:
    ours = {n for n in imports(path) if n.startswith("fedlora")}
    assert ours <= {"fedlora.lora", "fedlora.strategy", "fedlora.errors"}


def test_help_does_not_wait_for_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fedlora.__main__; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
