"""What the README says is so."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from fedlora import config as configuration
from fedlora.cli.app import app
from fedlora.cli.options import dotted
from fedlora.config import SHORT
from fedlora.strategy import catalogue
from tests.cli.test_simulate import fedlora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "strategies.md").read_text()
RUNS = sorted((ROOT / "simulations").glob("*.toml"))


def commands() -> list[str]:
    """Every line of the README's shell blocks that starts fedlora."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("fedlora simulate")]


def test_the_strategy_it_shows_runs_as_it_says(tmp_path: Path) -> None:
    """With the README's own command, in fewer rounds; and `most` does what its docstring says."""
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    command = next(c for c in commands() if "my_lab" in c)
    assert block is not None
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "clipped.py").write_text(block[1])
    words = [*shlex.split(command)[1:], "--rounds", "1", "--train.steps", "1", "--cohort", "2", "--out", "run"]
    done = fedlora(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "rounds.jsonl").read_text())["answered"] == 2


@pytest.mark.parametrize("command", commands())
def test_the_options_it_names_exist(command: str) -> None:
    words = shlex.split(command, comments=True)[2:]
    given = dotted([w for w in words if w])
    keys = {
        SHORT.get(k.replace("-", "_"), k): v for k, v in given.items() if k not in ("config", "out", "resume", "option")
    }
    assert given and configuration.build(keys).rounds


@pytest.mark.parametrize("run", RUNS, ids=lambda p: p.stem)
def test_the_runs_that_were_kept_are_valid(run: Path) -> None:
    assert run.read_text().startswith("# fedlora simulate ")
    configuration.build(configuration.read(run))


def test_the_tables_of_strategies_are_the_catalogues() -> None:
    """The README's and that of docs/strategies.md: every built-in, with what it declares."""
    for e in (e for e in catalogue() if e.cls.__module__.startswith("fedlora.strategies.")):
        made, (trains, sends) = e.default, e.sides
        exact, sums = ("yes" if flag else "no" for flag in (made.exact, made.sums_only))
        ranks = "mixed" if made.mixed_ranks else "alike"
        assert f"| `{e.name}` | {e.title} | {exact} | {trains} | {sends} | {ranks} | <{e.paper}> |" in README
        row = [f"`{e.name}`", f"[{e.title}]({e.paper})", exact, ranks, sums, trains, sends, " ".join(made.kinds)]
        assert f"| {' | '.join(row)} | `{made.up}` | `{made.down}` |" in DOCS


def test_the_keys_of_a_round_are_all_named() -> None:
    from fedlora.run.plan import RoundResult

    record = RoundResult(1, None, (), {}, None, None, None, 0, 0, 0.0, {"kept": 1.0}, 0.5).record()
    assert all(f"`{key}`" in README for key in record)


def test_the_keys_it_makes_are_those_that_its_commands_name(tmp_path: Path) -> None:
    """The README's `provision` is run; of `server` and `client` the options are there, and the folders they name."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "fedlora provision" in b)
    made, server, client = (shlex.split(line) for line in block.strip().splitlines())
    assert fedlora(*made[1:], cwd=tmp_path).returncode == 0
    assert (tmp_path / server[server.index("--credentials") + 1] / "server.key").exists()
    assert (tmp_path / "keys" / "clients" / client[client.index("--credentials") + 1] / "client.key").exists()
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for words in (made, server, client):
        known = {o for p in commands[words[1]].params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= known


def test_the_compose_files_are_valid_yaml_with_every_wall() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {"provision", "superlink", "server", "proxy", "client-1", "client-2", "client-3"} <= set(services)
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["user"] == "10001:10001", name
    assert [name for name, s in services.items() if "ports" in s] == ["proxy"]
    assert all("back" not in s["networks"] for name, s in services.items() if name.startswith("client"))
