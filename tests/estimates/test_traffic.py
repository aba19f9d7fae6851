"""The bytes that are estimated are those that a run counts, for every strategy."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.api import checked_settings, simulate
from fedlora.config import dotted_keys
from fedlora.estimates.estimate import estimate
from fedlora.estimates.live_bytes import LiveBytes
from fedlora.estimates.played import PlayedRounds, play, varies
from fedlora.run.directory import RunDirectory
from fedlora.run.privacy_statement import summary_lines
from fedlora.run.setup import RunSetup, prepare
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.strategy import catalogue
from tests.support.small_run import site

SETTINGS: dict[str, Any] = {
    "clients": 3,
    "cohort": 2,
    "rounds": 3,
    "threads": 1,
    "train": {"lr": 0.05, "steps": 2, "batch_size": 4},
    "lora": {"rank": 2},
    "data": {"partition": "iid", "eval_share": 0.2, "holdout": 0.2},
}
UP_TO = ("florist",)  # whose rank is that of what clients learn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def setup(place: Path) -> Iterator[RunSetup]:
    files = {"model.path": str(place / "model"), "data.path": str(place / "client_0.jsonl")}
    yield prepare(checked_settings(files, dotted_keys(SETTINGS)))


def real(setup: RunSetup, played: PlayedRounds, folder: Path) -> list[tuple[int, int]]:
    """The bytes up and down of each round, with all of its training."""
    fleet = Serial(setup.model, setup.clients_data, setup.ranks, folder)
    return [(d.bytes_up, d.bytes_down) for d in fit(played.strategy, fleet, setup.start, played.plan)]


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_each_round_sends_what_was_estimated(name: str, setup: RunSetup, tmp_path: Path) -> None:
    chosen = replace(setup, config=replace(setup.config, strategy=name))
    played = play(chosen, RunDirectory(tmp_path / "played"), LiveBytes())
    found, counted = [*zip(played.up, played.down, strict=True)], real(chosen, played, tmp_path / "real")
    if name not in UP_TO:
        assert found == counted
        return
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in zip(found, counted, strict=True))
    assert varies(chosen, played)


def test_an_estimate_is_of_the_run_that_follows(place: Path, tmp_path: Path) -> None:
    """Bytes as rounds.jsonl has them, of compressed updates; and its own words about privacy."""
    private = {"dp.noise": 1.0, "dp.metrics": True, "dp.rate": 0.5}
    files = {"model.path": str(place / "model"), "data.path": str(place / "client_*.jsonl"), "clients": 2}
    settings = dotted_keys(SETTINGS) | private | files | {"strategy": "fedex_lora", "messages.up": "int8"}
    settings["data.partition"] = "files"
    found = estimate(checked_settings(settings, {}))
    run = simulate(settings, out=tmp_path / "run", progress=False)
    assert found.traffic.rounds_up == tuple(record["bytes_up"] for record in run.rounds)
    assert found.traffic.rounds_down == tuple(record["bytes_down"] for record in run.rounds)
    assert (found.traffic.run_up, found.traffic.played) == (sum(found.traffic.rounds_up), 3)
    assert found.privacy == tuple(summary_lines(json.loads((run.folder / "privacy.json").read_text())))
    assert " at delta 1e-05 for a row" in found.privacy[0]
    assert found.base_numbers > found.trained_numbers >= found.sent_numbers > 0
    assert found.disk_run > 0 and found.pace.run > 0
    assert "\n".join(found.privacy) in "\n".join(found.lines())
