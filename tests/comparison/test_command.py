"""`fedlora compare` as a person has it: killed, gone on with, shown; and what it refuses."""

import json
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fedlora.comparison import settings
from fedlora.errors import ConfigError
from fedlora.strategy import catalogue
from tests.cli.test_simulate import fedlora
from tests.support.comparisons import comparison, job

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def words(folder: Path) -> list[str]:
    given = [word for key, value in job(folder).items() for word in (f"--{key}", str(value))]
    return ["compare", *given, "--strategies", "fedavg", "--seeds", "1", "--out", str(folder / "found.json")]


def command(asked: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command as a process that may have processes of its own, which a forked one of the tests may not."""
    whole = [sys.executable, "-m", "fedlora", *asked]
    return subprocess.Popen(whole, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def runs(file: Path) -> dict[str, dict[str, object]]:
    with suppress(FileNotFoundError):
        found: dict[str, dict[str, object]] = json.loads(file.read_text())["runs"]
        return found
    return {}


def test_what_was_done_before_it_was_killed_is_not_done_again(tmp_path: Path) -> None:
    file, asked = tmp_path / "found.json", words(tmp_path)
    first = command(asked, tmp_path)
    until = time.monotonic() + 240
    while not runs(file) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    before = runs(file)
    assert 0 < len(before) < 3
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive and gone, "processes go on without the one that started them"
    again = fedlora(*asked, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after = runs(file)
    assert len(after) == 3 and {name: after[name] for name in before} == before
    assert len([line for line in again.stderr.splitlines() if "s of CPU" in line]) == 3 - len(before)
    found = {row["line"]: row["figures"] for row in json.loads(again.stdout)}
    assert {*found} == {"alone", "pooled", "fedavg"} and all("test accuracy" in f for f in found.values())


def test_lines_and_settings_that_are_none_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'no "lins"; did you mean "lines"'):
        comparison({}, lins=[])
    with pytest.raises(ConfigError, match=r"unknown key"):
        comparison({}, strategies=["fedavg"], grid={"lora.rnk": [4]})
    with pytest.raises(ConfigError, match=r"line name"):
        comparison({}, lines=[{"strategy": "fedavg"}, {"strategy": "fedavg", "lora": {"rank": 4}}])
    with pytest.raises(ConfigError, match=r"--lines.*did you mean"):
        settings.only(comparison({}, strategies=["fedavg"]), "fedavgg")
    with pytest.raises(ConfigError, match=r"a list of values"):
        comparison({}, tune={"train": {"lr": 0.1}})
    with pytest.raises(ConfigError, match=r"engine = flower"):
        comparison({"engine": "flower"}, strategies=["fedavg"])


def test_cases_and_grids_make_every_combination() -> None:
    made = comparison({}, strategies=["fedavg"], cases={"a": {}, "b": {"rounds": 2}}, grid={"lora.rank": [4, 8]})
    assert [case.name for case in made.cases] == [f"{c}, lora.rank = {r}" for c in "ab" for r in (4, 8)]
    assert made.config(made.lines[2], made.cases[3], {}).rounds == 2
    assert made.config(made.lines[2], made.cases[3], {}).lora.rank == 8


def test_options_say_what_a_file_does() -> None:
    said = settings.from_words(
        strategies="fedavg, flora", seeds="0,5", grid=["lora.rank=4,8"], tune=["train.lr=1e-3,1"], against="flora"
    )
    made = settings.comparison(said, {}, Path())
    assert [line.name for line in made.lines] == ["alone", "pooled", "fedavg", "flora"] and made.seeds == (0, 5)
    assert made.tune == {"train.lr": (0.001, 1)} and made.reference == "flora" and len(made.cases) == 2


def test_baselines_have_no_noise_and_no_settings_of_a_server() -> None:
    made = comparison(
        {}, strategies=["fedavg"], cases={"private": {"dp": {"epsilon": 3.0}, "model": {"head": "local"}}}
    )
    for line in made.lines[:2]:
        config = made.config(line, made.cases[0], {"seed": 1})
        assert not config.dp.on and config.model.head == "shared" and config.seed == 1


@pytest.mark.parametrize("name", ["sst2_strategies", "banking77_strategies"])
def test_every_built_in_strategy_is_on_a_line_and_what_takes_mixed_ranks_with_them(name: str) -> None:
    tree = settings.read(BENCHMARKS / f"{name}.toml")
    made = settings.comparison(tree, {}, BENCHMARKS)
    there = [made.config(line, made.cases[0], {}) for line in made.lines if not line.baseline]
    known = [e for e in catalogue() if e.cls.__module__.startswith("fedlora.strategies.")]
    assert {e.name for e in known} <= {config.strategy for config in there}
    mixed = {config.strategy for config in there if config.lora.ranks}
    assert {e.name for e in known if e.default.mixed_ranks} <= mixed and "fedex_lora" in mixed
    assert len(made.cases) == 2 and made.config(made.lines[2], made.cases[1], {}).dp.epsilon == 3.0


def test_la_loras_claim_has_the_private_runs_of_the_table_of_all_and_its_filter_as_a_rate() -> None:
    every, claim = (
        settings.comparison(settings.read(BENCHMARKS / f"{name}.toml"), {}, BENCHMARKS)
        for name in ("sst2_strategies", "la_lora")
    )
    there, tuned = {line.name: line for line in every.lines}, {"train.lr": 1.5}
    for line in claim.lines[2:]:
        assert claim.config(line, claim.cases[1], tuned) == every.config(there[line.name], every.cases[1], tuned)
    rates = claim.tune["train.lr"]
    known = [rate for rate in rates if rate in every.tune["train.lr"]]
    kept = (70 / 256) ** 0.5  # of what is white along the features, by [1 4 6 4 1] / 16
    assert [rate for rate in rates if rate not in known] == [pytest.approx(kept * rate, rel=0.01) for rate in known[1:]]


def test_the_file_that_the_docs_show_is_one(tmp_path: Path) -> None:
    text = (BENCHMARKS.parent / "docs" / "compare.md").read_text()
    (tmp_path / "sst2.toml").write_text("rounds = 9")
    made = settings.comparison(tomllib.loads(text.split("```toml\n")[1].split("```")[0]), {}, tmp_path)
    assert len(made.lines) == 5 and len(made.cases) == 4 and made.config(made.lines[2], made.cases[0], {}).rounds == 5
