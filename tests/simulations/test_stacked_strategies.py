"""Every strategy comes to the same under the stacked engine as under serial; a new file is tested with no edit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.checks.federation import ALIKE, MIXED, PLAN
from fedlora.checks.small_models import small_model
from fedlora.lora import map_factors
from fedlora.server.rounds import fit
from fedlora.simulations.serial import Serial
from fedlora.simulations.stacked import Stacked
from fedlora.strategies.anchored import Anchored
from fedlora.strategies.capped import Capped
from fedlora.strategies.head import Head
from fedlora.strategy import Strategy, catalogue, load
from tests.support.float64 import in_float64

SMALL = small_model("bert")
NAMES = [entry.name for entry in catalogue() if entry.cls.__module__.startswith("fedlora.strategies.")]
OTHERS = [
    load("fedex_lora", assignment="keep"),
    load("fedex_lora", assignment="reinit"),
    Anchored(load("flora")),
    Capped(load("fedex_lora"), 3),
    Head(load("fedsa_lora"), "local"),
    Head(load("fedavg"), "frozen"),
]


@pytest.mark.parametrize("strategy", [*map(load, NAMES), *OTHERS], ids=str)
def test_a_strategy_comes_to_what_it_comes_to_under_serial(
    strategy: Strategy[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks, plan = MIXED if strategy.mixed_ranks else ALIKE, replace(PLAN, rounds=2)
    with in_float64(SMALL.model):
        start = map_factors(torch.Tensor.double, SMALL.start)
        fleets = [kind(SMALL.model, SMALL.clients, ranks, tmp_path / kind.__name__) for kind in (Serial, Stacked)]
        one, other = (list(fit(strategy, fleet, start, plan))[-1].state for fleet in fleets)
    serial, stacked = strategy.adapter(one), strategy.adapter(other)
    assert max(float((t - stacked.side(s)[m]).abs().max()) for s, m, t in serial.matrices()) < 1e-7
    assert "one after another" not in caplog.text
