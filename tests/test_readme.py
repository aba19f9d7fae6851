"""What README and the tables of the documents say is so."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fedlora import config as configuration
from fedlora.strategy import catalogue
from tests.cli.test_simulate import fedlora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STRATEGIES = (ROOT / "docs" / "strategies.md").read_text()
RUN_DIRECTORY = (ROOT / "docs" / "run-directory.md").read_text()
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text()
RUNS = sorted((ROOT / "simulations").glob("*.toml"))


@pytest.mark.parametrize("run", RUNS, ids=lambda p: p.stem)
def test_the_runs_that_were_kept_are_valid(run: Path) -> None:
    assert run.read_text().startswith("# fedlora simulate ")
    configuration.build(configuration.read(run))


def test_the_table_of_strategies_is_the_catalogues() -> None:
    """Every built-in, with what it declares."""
    for e in (e for e in catalogue() if e.cls.__module__.startswith("fedlora.strategies.")):
        made, (trains, sends) = e.default, e.sides
        exact, sums = ("yes" if flag else "no" for flag in (made.exact, made.sums_only))
        ranks = "mixed" if made.mixed_ranks else "alike"
        row = [f"`{e.name}`", f"[{e.title}]({e.paper})", exact, ranks, sums, trains, sends, " ".join(made.kinds)]
        assert f"| {' | '.join(row)} | `{made.up}` | `{made.down}` |" in STRATEGIES


def test_every_strategy_has_a_paragraph_of_its_own() -> None:
    for e in (e for e in catalogue() if e.cls.__module__.startswith("fedlora.strategies.")):
        assert re.search(rf"^\*\*{re.escape(e.title)}\*\* \(`{e.name}`\)\.", STRATEGIES, re.MULTILINE), e.name


def test_the_keys_of_a_round_are_all_named() -> None:
    from fedlora.run.plan import RoundResult

    record = RoundResult(1, None, (), {}, None, None, None, 0, 0, 0.0, {"kept": 1.0}, 0.5, each={}).record()
    assert all(f"`{key}`" in RUN_DIRECTORY for key in record)


def test_the_keys_it_makes_are_those_that_its_commands_name(tmp_path: Path) -> None:
    """`provision` is run as the page has it; `server` and `client` name folders that it makes."""
    block = next(b for b in re.findall(r"```bash\n(.*?)```", DEPLOYMENT, re.DOTALL) if "fedlora provision" in b)
    made, server, client = (shlex.split(line) for line in block.strip().splitlines())
    assert fedlora(*made[1:], cwd=tmp_path).returncode == 0
    assert (tmp_path / server[server.index("--credentials") + 1] / "server.key").exists()
    assert (tmp_path / "keys" / "clients" / client[client.index("--credentials") + 1] / "client.key").exists()


def test_the_compose_files_are_valid_yaml_with_every_wall() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {"provision", "superlink", "server", "proxy", "client-1", "client-2", "client-3"} <= set(services)
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["user"] == "10001:10001", name
    assert [name for name, s in services.items() if "ports" in s] == ["proxy"]
    assert all("back" not in s["networks"] for name, s in services.items() if name.startswith("client"))
