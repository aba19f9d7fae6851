"""What bfloat16 costs in accuracy and gains in time: fp32, bf16 and mixed on BANKING77 and SST-2, over three seeds.

    python -m benchmarks.precision --model MINILM --banking77 banking77 --sst2 sst2 --json benchmarks/precision.json

MINILM, banking77 and sst2 are as in simulations/banking77.toml and simulations/sst2.toml, whose settings the runs
have, with fewer rounds. The runs of a seed come one after another, so that all see much the same load. CPU time is that
of the whole run in this process; the speed of the products is measured at MiniLM's shapes, bfloat16 over float32. Runs
that are in the file already are not repeated. `precision = auto` may take bf16 or mixed only where the table shows
both: less CPU time, and an accuracy within half a point of fp32's.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from benchmarks import process_usage
from fedlora import simulate
from fedlora.config import read
from fedlora.kernels.precision import speed_of_bfloat16

PRECISIONS = ("fp32", "bf16", "mixed")
SIMULATIONS = Path(__file__).parents[1] / "simulations"
ROUNDS = {"banking77": 20, "sst2": 5}
SMOKE: Mapping[str, Any] = {
    "rounds": 1,
    "train.steps": 1,
    "data.limit": 60,
    "data.eval_limit": 20,
    "clients": 2,
    "cohort": 2,
}
POINTS = 0.5  # of accuracy, that a precision may lose


@dataclass(frozen=True)
class PrecisionRun:
    """One run: a data set, a seed and a precision."""

    data: str
    seed: int
    precision: str

    @property
    def name(self) -> str:
        return f"{self.data} {self.seed} {self.precision}"


def main() -> None:
    """Do the runs that are left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of MiniLM")
    parser.add_argument("--banking77", help="folder with train.csv and test.csv")
    parser.add_argument("--sst2", help="folder with client_*.jsonl and val.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="fp32 and those to compare with it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--smoke", action="store_true", help="a seconds-long form")
    options = parser.parse_args()
    places = {name: folder for name in ROUNDS if (folder := getattr(options, name))}
    common = {"model.path": options.model, "threads": options.threads} | (dict(SMOKE) if options.smoke else {})
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    results["machine"] = machine()
    for run in planned(list(places), options.seeds, options.precisions.split(",")):
        if run.name not in results:
            results[run.name] = measure(run, places[run.data], common)
            options.json.write_text(json.dumps(results, indent=1) + "\n")
            print(run.name, results[run.name], flush=True)
    print(table(results))


def planned(data: Sequence[str], seeds: int, precisions: Sequence[str]) -> Iterator[PrecisionRun]:
    """Yield all runs, those of one data set and seed after one another."""
    for name, seed, precision in product(data, range(seeds), precisions):
        yield PrecisionRun(name, seed, precision)


def measure(run: PrecisionRun, folder: str, common: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy of a run, in points, and its CPU seconds."""
    files = {"banking77": ("train.csv", "test.csv"), "sst2": ("client_*.jsonl", "val.jsonl")}[run.data]
    data = {"data.path": f"{folder}/{files[0]}", "data.eval": f"{folder}/{files[1]}", "rounds": ROUNDS[run.data]}
    own: dict[str, Any] = {"precision": run.precision, "seed": run.seed, "server.eval_every": 0}
    began = time.process_time()
    with TemporaryDirectory() as out:
        settings = read(SIMULATIONS / f"{run.data}.toml") | data | dict(common) | own
        ended = simulate(settings, out=f"{out}/run", progress=False)
    return {"accuracy": 100 * ended.evaluation["accuracy"], "cpu_seconds": round(time.process_time() - began, 1)}


def machine() -> dict[str, Any]:
    """What these figures hold for."""
    shapes = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 1536), nn.Linear(1536, 384))
    return {
        **process_usage.machine(),
        "speed_of_bfloat16_products": round(speed_of_bfloat16(shapes), 3),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy and CPU time of every data set and precision, against fp32's of the same seeds."""
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for name, found in results.items():
        data, _, rest = name.partition(" ")
        seed, _, precision = rest.partition(" ")
        plain = results.get(f"{data} {seed} fp32")
        if precision and plain:
            gained = plain["cpu_seconds"] / max(found["cpu_seconds"], 1e-9)
            rows.setdefault((data, precision), []).append((found["accuracy"], plain["accuracy"], gained))
    lines = ["| data | precision | accuracy | points against fp32 | times as fast |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(*key, values) for key, values in rows.items())])


def _line(data: str, precision: str, values: Sequence[tuple[float, float, float]]) -> str:
    accuracy, plain, gained = (fmean(column) for column in zip(*values, strict=True))
    verdict = "" if abs(accuracy - plain) <= POINTS else " (too far)"
    return f"| {data} | {precision} | {accuracy:.2f} | {accuracy - plain:+.2f}{verdict} | {gained:.2f} |"


if __name__ == "__main__":
    main()
