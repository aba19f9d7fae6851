"""The folder that Flower's own commands take: its settings, the bundle that is made of it, and what they load of it."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from flwr.cli.app_cmd.publish import _collect_file_paths, _validate_files
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.fab_format_version import normalize_and_validate_fab_format
from flwr.supercore.object_ref import load_app

import fedlora
from fedlora.config import build, dotted_keys, settings
from fedlora.deployment.processes import free_port, kill_marked, program
from tests.support.federation import SLOW

FOLDER = Path(__file__).parents[2] / "deploy" / "fedlora-app"
ROOT = FOLDER.parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "pyproject.toml").read_text())


def test_its_settings_have_the_same_keys_and_defaults_as_fedloras(project: dict[str, Any]) -> None:
    declared = dotted_keys(project["tool"]["flwr"]["app"]["config"])
    assert set(declared) == {s.key for s in settings()}
    assert build(declared) == build()


def test_its_versions_are_those_of_fedlora_and_of_the_flower_that_was_run(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == fedlora.__version__
    assert project["tool"]["flwr"]["app"]["flwr-version-target"] == version("flwr")
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    flower = next(word for word in ours["project"]["dependencies"] if word.startswith("flwr>"))
    assert project["project"]["dependencies"] == [flower]  # Flower installs all others anew for every run
    assert project["build-system"] == ours["build-system"]


def test_flowers_build_makes_a_bundle_in_the_format_of_today(project: dict[str, Any]) -> None:
    config, warnings = load_and_validate(FOLDER / "pyproject.toml")
    assert config == project and warnings == []
    kept = normalize_and_validate_fab_format(project)
    assert kept.fab_format_version == 1 and kept.flwr_version_target == version("flwr")
    with ZipFile(BytesIO(build_fab_from_disk(FOLDER))) as bundle:
        assert {"LICENSE", "README.md", "pyproject.toml"} <= set(bundle.namelist())
        assert tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]["fab-format-version"] == 1


@pytest.mark.parametrize(("component", "kind"), [("serverapp", ServerApp), ("clientapp", ClientApp)])
def test_what_flower_loads_of_it_are_apps(component: str, kind: type, project: dict[str, Any], tmp_path: Path) -> None:
    named = project["tool"]["flwr"]["app"]["components"][component]
    assert isinstance(load_app(named, ValueError, tmp_path), kind)


def test_all_of_it_could_be_published() -> None:
    paths = _collect_file_paths(FOLDER)
    _validate_files(paths)
    assert {path.name for path in paths} == {"LICENSE", "README.md", "pyproject.toml"}
    assert (FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_a_strategy_of_ones_own_travels_in_the_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "my-app"
    shutil.copytree(FOLDER, folder)
    (folder / "mine.py").write_text('"""Mine: a strategy of one\'s own."""\n')
    with ZipFile(BytesIO(build_fab_from_disk(folder))) as bundle:
        assert "mine.py" in bundle.namelist()


def test_flowers_own_command_runs_it(tmp_path: Path) -> None:
    """On the SuperLink that `flwr run` starts for simulations, and leaves running."""
    app = shutil.copytree(FOLDER, tmp_path / "app")
    home = str(tmp_path / "home")
    two = [
        "--federation-config",
        "num-supernodes=2",
        "--run-config",
        "clients=2 cohort=2 rounds=1 train.steps=1",
    ]
    by_name = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as Flower starts its own programs
    ports = {f"FLWR_LOCAL_{of}_API_PORT": str(free_port()) for of in ("CONTROL", "SUPERLINK_HTTP")}
    env = os.environ | {"FLWR_HOME": home, "OMP_NUM_THREADS": "1", "PATH": by_name} | ports
    try:
        command = [program("flwr"), "run", str(app), "local", "--stream", *two]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SLOW, check=False)
    finally:
        kill_marked("flower-", "FLWR_HOME", home)
    assert "loaded afresh by PEFT, it gives the run's logits" in done.stdout, done.stdout + done.stderr
