"""Like for like: the order of turns, the table, what disagrees, the plain app's parts, and the small form itself."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from benchmarks import smoke
from benchmarks.like_for_like import (
    SERIAL,
    STACKED,
    WORKLOADS,
    Engine,
    Place,
    adapter_sample,
    disagreement,
    exists,
    place_of,
    ready,
    run,
    table,
    turns,
)
from benchmarks.peers.task import encode, get_model, get_trainer, load_partition, load_rows, scores

PLACE = Place("minilm", "model", "data", neighbours=2, smoke=False)
ENGINES = STACKED, SERIAL


def ran(wall: float, **more: Any) -> dict[str, Any]:
    return {"wall": wall, "cpu": 2 * wall, "peak": 5e8, "load": 1.0, "eval": {"loss": 1.5, "accuracy": 0.5}, **more}


def test_engines_take_turns_and_what_was_measured_is_not_measured_again() -> None:
    wanted = turns(PLACE, ENGINES, 2)
    assert [t.line for t in wanted] == 2 * [f"minilm, 2 busy neighbours: {e.name}" for e in ENGINES]
    assert list(ready(wanted, {wanted[0].line: {"0": ran(1.0)}})) == wanted[1:]


def test_ratios_are_medians_over_turns_against_the_first_line() -> None:
    wanted = turns(PLACE, ENGINES, 3)
    results = {wanted[0].line: {str(n): ran(w) for n, w in enumerate((1.0, 2.0, 4.0))}}
    results |= {wanted[1].line: {str(n): ran(w) for n, w in enumerate((3.0, 4.0, 40.0))}}
    assert "| 3.0, 4.0, 40.0 | 8.0 | 500 MB | 3.00 | 3.00 | 1.500 | 50 % |" in table(results, wanted)


def test_an_engine_that_comes_to_another_adapter_is_named() -> None:
    wanted = turns(PLACE, ENGINES, 1)
    stacked, serial = (turn.line for turn in wanted)
    close = {stacked: {"0": ran(1.0, adapter=[1.0, 2.0])}, serial: {"0": ran(1.0, adapter=[1.0, 2.00001])}}
    far = close | {stacked: {"0": ran(1.0, adapter=[1.0, 2.1])}}
    assert disagreement(close, wanted) == ""
    assert disagreement(far, wanted).startswith(f"{stacked} is 4.5e-02 from serial")


def test_settings_of_another_version_leave_an_engine_out() -> None:
    assert exists(SERIAL) and not exists(Engine("faster", {"engine": "faster"}))


def test_engines_agree_on_the_small_job_and_its_command_says_what_it_used(tmp_path: Path) -> None:
    given = Namespace(workload="minilm", model="", data=None, neighbours=0, smoke=True)
    place = place_of(given, tmp_path)
    turn = turns(place, [STACKED], 1)[0]
    done = run(place, turn)
    assert done["cpu"] > 0.5 and done["peak"] > 1e8 and done["eval"]["loss"] > 0
    fedlora.simulate(place.settings, out=tmp_path / "run", progress=False, engine="serial")
    serial = turns(place, [SERIAL], 1)[0]
    sample = adapter_sample(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not disagreement({turn.line: {"0": done}, serial.line: {"0": {"adapter": sample}}}, [turn, serial])


@pytest.mark.parametrize(("task", "suffix", "targets"), [("classify", "csv", "query,value"), ("lm", "jsonl", "q_proj")])
def test_the_plain_app_trains(task: Any, suffix: str, targets: str, tmp_path: Path) -> None:
    model, data = smoke.inputs(task, tmp_path)
    settings = {"model": model, "data": f"{data}/train.{suffix}", "targets": targets, "max-length": 16}
    settings |= {"lr": 0.01, "steps": 6, "batch-size": 4}
    torch.manual_seed(0)
    examples = encode(load_partition(1, 3, settings["data"]), settings)
    net = get_model(settings)
    before = scores(net, settings, examples)
    get_trainer(net, settings, examples).train()
    assert len(examples) == len(load_rows(settings["data"])) / 3
    assert scores(net, settings, examples)["loss"] < before["loss"]


def test_every_job_compares_with_stacked() -> None:
    assert all(job.engines[0] == STACKED for job in WORKLOADS.values())
