"""What threads cost that spin while they wait: the same training steps under three policies, alone and beside others.

    python -m benchmarks.spinning [--runs 5 --steps 8 --threads 2 --neighbours 2] [--smoke]

Each run is a process of its own, as the policy is read when torch is loaded. It trains the embedded model for some
steps of 8 x 126 tokens, on a machine with nothing else to do and then with busy processes beside it. The policies take
turns. `GOMP_SPINCOUNT` bounds how often a thread looks before it sleeps. Prints milliseconds of a step by the clock and
of the processor (min / median / max), and writes spinning.json. `--smoke` is one short run of each policy.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from os import environ, getloadavg
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.process_usage import busy_neighbours, machine

POLICIES: Mapping[str, Mapping[str, str]] = {
    "as torch comes": {},
    "PASSIVE (fedlora's)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
}
LONGEST = 600.0  # seconds of a run; spinning ones may never end beside busy neighbours
CODE = "from benchmarks.spinning import train; train({steps}, {threads})"


@dataclass(frozen=True)
class Run:
    """What a step took in one process."""

    policy: str
    neighbours: int
    wall: float  # seconds a step, by the clock
    cpu: float  # seconds a step, of all threads
    load: float  # of the machine in the minute before


def train(steps: int, threads: int) -> None:
    """Train the embedded model for some steps, and print the seconds of a step by the clock and of the processor."""
    from fedlora.client import training
    from fedlora.config import EMBEDDED, build, read
    from fedlora.jobs import Job
    from fedlora.lora import LoRA
    from fedlora.run.setup import prepare

    setup = prepare(build(read(EMBEDDED), {"clients": 2, "threads": threads}))
    job = Job(setup.start, training=replace(setup.config.train, steps=1))
    examples, nothing_kept = setup.clients_data[0].train, LoRA({}, {}, {})
    training.train(setup.model, job, 0, examples, nothing_kept)
    began, used = time.monotonic(), time.process_time()
    training.train(setup.model, replace(job, training=replace(job.training, steps=steps)), 0, examples, nothing_kept)
    print(json.dumps([(time.monotonic() - began) / steps, (time.process_time() - used) / steps]))


def measure(policy: str, neighbours: int, steps: int, threads: int) -> Run | None:
    """One run; none where it did not end in time."""
    load = getloadavg()[0]
    known = {key: value for key, value in environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", CODE.format(steps=steps, threads=threads)]
    environment = {**known, "OMP_WAIT_POLICY": "", **POLICIES[policy]}  # empty: not fedlora's own choice either
    with busy_neighbours(neighbours):
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return None
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return Run(policy, neighbours, round(wall, 4), round(cpu, 4), round(load, 2))


def table(runs: Sequence[Run]) -> Table:
    """A row for each policy and number of neighbours."""
    shown = Table("", "busy neighbours", "runs", "clock, ms a step", "processor, ms a step", box=box.MARKDOWN)
    for neighbours, policy in dict.fromkeys((run.neighbours, run.policy) for run in runs):
        chosen = [run for run in runs if (run.neighbours, run.policy) == (neighbours, policy)]
        figures = [" / ".join(_three(values)) for values in ([r.wall for r in chosen], [r.cpu for r in chosen])]
        shown.add_row(policy, str(neighbours), str(len(chosen)), *figures)
    return shown


def _three(values: Sequence[float]) -> list[str]:
    return [f"{1000 * value:.0f}" for value in (min(values), median(values), max(values))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all policies in turn, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args(arguments)
    times, steps, beside = (1, 1, (0,)) if given.smoke else (given.runs, given.steps, (0, given.neighbours))
    found = [
        measure(policy, neighbours, steps, given.threads)
        for neighbours, _, policy in product(beside, range(times), POLICIES)
    ]
    runs = [run for run in found if run]
    told: dict[str, Any] = {"machine": machine(), "threads": given.threads, "did not end": found.count(None)}
    given.out.write_text(json.dumps(told | {"runs": [vars(run) for run in runs]}, indent=1) + "\n")
    Console(width=120).print(table(runs))


if __name__ == "__main__":
    main()
