"""Asynchronous rounds against rounds: how far quick clients pull the model, and the time to a given accuracy.

    python -m benchmarks.asynchronous --out asynchronous.json [--model MINILM --data banking77] [--jobs 2] [--smoke]

Two tables, both on the simulated clock. *Bias*: five clients ten times as quick as five others, which pull every number
of the model to 1 and to 0; where the model settles, which is 0.5 without a bias. *Time*: BANKING77's fifty clients with
speeds spread tenfold, ten at work at once whatever the mode, until the test accuracy reaches shares of what rounds
without a deadline end with. Every mode has the same number of trainings that count towards its models at most. Without
--model and --data the first table alone. The file of results is gone on with. `--smoke` takes seconds, with a tiny
model and data of its own.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import smoke, sweep
from benchmarks.tables import markdown
from fedlora import config as configuration
from fedlora import simulate
from fedlora.errors import Failure, FedloraError
from fedlora.jobs import Client, Job, Update
from fedlora.lora import LoRA
from fedlora.messages.parts import PartTracker
from fedlora.metrics import Metrics
from fedlora.run.plan import Plan
from fedlora.sections import Policy, Training
from fedlora.server.aggregation import Answers
from fedlora.server.asynchronous import fit_asynchronously
from fedlora.server.rounds import fit
from fedlora.simulations.client_traces import ClientTrace, speeds
from fedlora.simulations.clock import ClockedFleet
from fedlora.strategies.fedavg import FedAvg

ROOT = Path(__file__).parents[1]
RATE = 0.1  # share of the way to its target that a client goes in a training
VERSIONS, SETTLED = 1000, 300  # in all, and of those the ones before which the model has not settled
SLOW = (0.9, 0.95, 1.0, 1.05, 1.1)  # speeds: equal ones would arrive in step, and train on what they just changed
QUICK = tuple(10 * speed for speed in SLOW)
BIAS: Mapping[str, Mapping[str, Any]] = {
    "rounds of all ten": {"mode": "rounds"},
    "async": {"staleness": 0.0},
    "async, staleness weights": {"staleness": 0.5},
    "async, fair": {"staleness": 0.0, "fair": True},
    "async, fair, staleness weights": {"staleness": 0.5, "fair": True},
}
SPEEDS = "loguniform:1-10"
COHORT, BUFFER, TRAININGS = 10, 5, 200
ROUNDS = {"rounds": TRAININGS // COHORT}
ASYNC = {"server.mode": "async", "server.buffer": BUFFER, "rounds": TRAININGS // BUFFER}
MODES: Mapping[str, Mapping[str, Any]] = {
    "rounds": ROUNDS,
    "rounds, deadline 20 s": {**ROUNDS, "server.deadline": 20.0, "server.quorum": 0.1, "server.below_quorum": "skip"},
    "async": ASYNC,
    "async, fair": {**ASYNC, "server.fair": True},
    "rounds, deadline 40 s": {**ROUNDS, "server.deadline": 40.0, "server.quorum": 0.1, "server.below_quorum": "skip"},
    "rounds, first half": {**ROUNDS, "server.quorum": 0.5, "server.grace": 0.0},
    "async, no staleness weights": {**ASYNC, "server.staleness": 0.0},
}
TIME: Mapping[str, Any] = {
    "cohort": COHORT,
    "simulation.speed": SPEEDS,
    "train.steps": 2,
    "train.batch_size": 8,
    "train.accumulate": 4,
    "data.eval_limit": 385,
    "server.max_staleness": 50,
}
SHARES = (0.5, 0.8, 0.95)  # of the accuracy that rounds end with
SMOKE: Mapping[str, Any] = {
    **{"clients": 6, "cohort": 4, "data.partition": "iid", "data.eval_limit": 12, "lora.targets": "query"},
    **{"train.batch_size": 2, "train.accumulate": 1},
}


@dataclass
class PulledClients:
    """Clients without data: each goes a share of the way to its own target, in every number that it trains."""

    targets: Sequence[float]
    traffic: PartTracker = field(default_factory=PartTracker)

    def clients(self) -> Sequence[Client]:
        return [Client(i, examples=10, rank=1) for i in range(len(self.targets))]

    def train(self, jobs: Mapping[int, Job]) -> Answers:
        yield from ((i, self._pulled(i, job)) for i, job in jobs.items())

    def ask(self, asks: Mapping[int, Any]) -> Mapping[int, Mapping[str, str] | Failure]:
        return {}

    def evaluate(self, jobs: Mapping[int, Job]) -> Mapping[int, Metrics | Failure]:
        return {}

    def _pulled(self, i: int, job: Job) -> Update:
        sides = {s: {m: t + RATE * (self.targets[i] - t) for m, t in job.start.side(s).items()} for s in job.shares}
        return Update(LoRA(**sides), 10, None)


def settles_at(buffer: int, versions: int, settled: int, **policy: Any) -> float:
    """The mean of the model over the versions at which it has settled, of five quick clients at 1 and five at 0."""
    fleet = PulledClients([1.0] * 5 + [0.0] * 5)
    rules = Policy(**{"mode": "async", "max_staleness": 1000, **policy})
    plan = Plan(versions, 10, training=Training(batch_size=10, steps=1), policy=rules, buffer=buffer)
    clocked = ClockedFleet(fleet, [ClientTrace(speed) for speed in (*QUICK, *SLOW)], 0, rules)
    start = LoRA({"m": torch.zeros(1, 1)}, {"m": torch.full((1, 1), 0.5)})
    loop = fit if rules.mode == "rounds" else fit_asynchronously
    return fmean(float(done.state.B["m"]) for done in [*loop(FedAvg(), clocked, start, plan)][settled:])


def bias(small: bool) -> str:
    """The first table."""
    versions, settled = (150, 75) if small else (VERSIONS, SETTLED)
    buffers = (1, 2, 5)
    rows = []
    for name, policy in BIAS.items():
        found = [settles_at(buffer, versions, settled, **policy) for buffer in buffers]
        rows.append([name, *(f"{value:.3f}" for value in found)])
    return markdown(["where the model settles", *(f"buffer {buffer}" for buffer in buffers)], rows)


@dataclass(frozen=True)
class TimedRun:
    """A run in one mode."""

    line: str
    seed: int

    @property
    def name(self) -> str:
        """Its name in the file of results."""
        return f"seed {self.seed}"


@dataclass(frozen=True)
class TimePlace:
    """The model and data that all runs have in common."""

    model: str
    data: str  # a folder with train.csv and test.csv
    small: bool

    def settings(self, run: TimedRun) -> configuration.Config:
        """The settings of one run."""
        named = {
            "model.path": self.model,
            "data.path": f"{self.data}/train.csv",
            "data.eval": f"{self.data}/test.csv",
            "seed": run.seed,
            "threads": 1,
        }
        often = {"server.eval_every": 4 if "server.mode" in MODES[run.line] else 2}
        layers = [configuration.read(ROOT / "simulations" / "banking77.toml"), named, TIME, often, MODES[run.line]]
        if self.small:
            layers += [SMOKE, {"rounds": 2, "server.eval_every": 1}]
        return configuration.build(*layers)


def timed(place: TimePlace, run: TimedRun) -> dict[str, Any]:
    """Do one run, and return its accuracy by the clock, and what became of the trainings."""
    with TemporaryDirectory() as folder:
        config = place.settings(run)
        records = simulate(config, out=Path(folder) / "run", progress=False).rounds
    arrivals = [tuple(arrival) for record in records for arrival in record.get("arrivals", ())]
    by_speed = speeds(config.simulation.speed, clients=config.clients, seed=config.seed)
    middle = median(by_speed)
    return {
        "course": [[r["clock"], r["eval"]["accuracy"]] for r in records if r["eval"]],
        "asked": sum(r["clients"] for r in records),
        "used": sum(r["answered"] for r in records),
        "ages": sorted(Counter(age for _, age in arrivals).items()),
        "quick": fmean(by_speed[i] > middle for i, _ in arrivals) if arrivals else None,
    }


def time_to(course: Sequence[Sequence[float]], accuracy: float) -> float | None:
    """When an accuracy was first there; None where it never was."""
    return next((clock for clock, found in course if found >= accuracy), None)


def times(results: sweep.Results) -> str:
    """The second table: medians over the seeds."""
    head = ["mode", *(f"s to {share:.0%}" for share in SHARES), "s in all", "accuracy", "used", "mean age", "of quick"]
    return markdown(head, [_row(name, results) for name in MODES if name in results])


def _row(name: str, results: sweep.Results) -> list[str]:
    """A mode's line: medians over its runs, and sums."""
    runs = [*results[name].values()]
    ends = [run["course"][-1] for run in runs]
    return [
        name,
        *(_reached(name, results, share) for share in SHARES),
        f"{median(clock for clock, _ in ends):.0f}",
        f"{median(accuracy for _, accuracy in ends):.3f}",
        f"{sum(run['used'] for run in runs)}/{sum(run['asked'] for run in runs)}",
        _mean_age(runs),
        _of_quick(runs),
    ]


def _reached(name: str, results: sweep.Results, share: float) -> str:
    """The time to this share of the accuracy that rounds of the same seed end with."""
    ends = {seed: run["course"][-1][1] for seed, run in results["rounds"].items()}
    found = [time_to(run["course"], share * ends[seed]) for seed, run in results[name].items()]
    reached = [clock for clock in found if clock is not None]
    return f"{median(reached):.0f}" if len(reached) == len(found) else "never"


def _mean_age(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many versions old the updates were on the average; empty for rounds."""
    ages = [age for run in runs for age, n in run["ages"] for _ in range(n)]
    return f"{fmean(ages):.1f}" if ages else ""


def _of_quick(runs: Sequence[Mapping[str, Any]]) -> str:
    """The share of updates that came from the quicker half of the clients; empty for rounds."""
    quick = [run["quick"] for run in runs if run["quick"] is not None]
    return f"{fmean(quick):.0%}" if quick else ""


def said(run: TimedRun, done: Mapping[str, Any]) -> str:
    """A run's error, or its end, in one line."""
    if "error" in done:
        return f"{run.line}, {run.name}: {done['error']}"
    clock, accuracy = done["course"][-1]
    return f"{run.line}, {run.name}: accuracy {accuracy:.3f} at {clock:.0f} s"


def main() -> None:
    """Parse, measure, print, write."""
    given = arguments()
    print(bias(given.smoke), flush=True)
    with TemporaryDirectory() as folder:
        model, data = smoke.inputs("classify", Path(folder)) if given.smoke else (given.model, given.data)
        if not (model and data):
            return
        place = TimePlace(str(model), str(data), given.smoke)
        runs = [TimedRun(line, seed) for seed in range(given.seeds) for line in MODES]

        def left(results: sweep.Results) -> Iterator[TimedRun]:
            yield from (run for run in runs if run.name not in results.get(run.line, {}))

        about = {"time": dict(TIME), "modes": {name: dict(mode) for name, mode in MODES.items()}, "small": given.smoke}
        results = sweep.sweep(left, partial(timed, place), said, (given.out, about), given.jobs)
    print(f"\nAccuracies are shares of what rounds end with; speeds {SPEEDS}, {COHORT} clients at work at once.\n")
    print(times({name: found for name, found in results.items() if all("error" not in run for run in found.values())}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", help="folder with train.csv and test.csv")
    parser.add_argument("--out", type=Path, default=Path("asynchronous.json"), help="file of results")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; each has its own model")
    parser.add_argument("--smoke", action="store_true", help="a small form with a tiny model and data of its own")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except FedloraError as e:
        sys.exit(str(e))
