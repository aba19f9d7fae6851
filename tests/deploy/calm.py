"""The run in which nothing happens, which others are compared with: the same settings in this process, round by round.

An undisturbed deployment is equal to it to the last bit, and takes ten times as long.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedlora.config import over_defaults
from fedlora.errors import Failure
from fedlora.run.console import ConsoleProgress, show_log
from fedlora.run.directory import RunDirectory
from fedlora.run.plan import RoundResult
from fedlora.run.setup import mute_transformers, prepare
from fedlora.server.aggregation import Answers
from fedlora.server.run import run_rounds
from fedlora.simulations.serial import Serial
from fedlora.strategy import Job


class Whole(RunDirectory):
    """Keeps every round's checkpoint, beside the two that the run keeps."""

    def save(self, done: RoundResult, record: Mapping[str, Any]) -> None:
        super().save(done, record)
        name = f"round-{done.number:06d}.safetensors"
        (self.path / "all").mkdir(exist_ok=True)
        shutil.copyfile(self.checkpoints / name, self.path / "all" / name)


class Without(Serial):
    """A fleet one of whose clients never answers."""

    absent: int | None = None

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        yield from super().train({i: job for i, job in jobs.items() if i != self.absent})
        if self.absent in jobs:
            yield self.absent, Failure("it sends nothing")


def calm(out: Path, settings: Mapping[str, Any], absent: int | None = None) -> Path:
    """Run it; the folder with the checkpoint of every round."""
    show_log()
    mute_transformers()
    torch.set_num_threads(1)  # as the deployed ones have it: sums are in another order with more
    setup = prepare(over_defaults({}, settings))
    folder, screen = Whole(out), ConsoleProgress()
    folder.create(setup.config)
    fleet = Without(setup.model, setup.clients_data, setup.ranks, folder.clients)
    fleet.absent = absent
    try:
        run_rounds(setup, fleet, folder, screen)
    finally:
        screen.close()
    return out / "all"
