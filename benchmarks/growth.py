"""How time and memory grow with the clients that there are, and with the rank: a table and a plot.

    python -m benchmarks.growth --out growth [--engine stacked --clients 10,50,200,1000,10000 --ranks 4,8,16,32,64]

A tiny BERT, as wide as the highest rank, classifies 40,000 short texts that are dealt out evenly; in each of three
rounds at most 50 clients train two steps of 4. Every run is a command of its own: seconds by the clock until it ends,
outside of the rounds and of a later round, CPU time and peak memory. The first series has rank 8, the second 50
clients. `--smoke` does two small runs.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import smoke
from benchmarks.process_usage import machine, measure
from benchmarks.tables import markdown
from benchmarks.tiny_models import WORDS
from fedlora.run.directory import RunDirectory

ROWS = 40_000
SETTINGS: Mapping[str, Any] = {
    "rounds": 3,
    "data.partition": "iid",
    "data.eval_limit": 100,
    "server.eval_every": 3,
    "lora.targets": "query,value",
    "train.steps": 2,
    "train.batch_size": 4,
    "train.lr": 1e-3,
    "threads": 1,
}
LIMIT = 1800.0  # seconds of a run


def write_rows(path: Path, count: int) -> None:
    """Short texts of four classes."""
    with path.open("w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(("text", "label"))
        for i in range(count):
            words = (WORDS[(i * (j + 3) + j * j) % len(WORDS)] for j in range(6 + i % 10))
            out.writerow((" ".join(words), f"class {i % 4}"))


def run(settings: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Run `fedlora simulate` with these settings, and return what it used."""
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    usage, _ = measure([sys.executable, "-m", "fedlora", "simulate", "--out", str(folder), *options], {}, LIMIT)
    seconds = [float(record["seconds"]) for record in RunDirectory(folder).records()]
    return {**usage.record(), "start": usage.wall - sum(seconds), "round": median(seconds[1:])}


def series(given: argparse.Namespace, base: Mapping[str, Any], folder: Path) -> dict[str, list[dict[str, float]]]:
    """Runs with more and more clients, and runs with larger and larger ranks."""
    cells = {
        "clients": [{"clients": n, "rank": 8} for n in given.clients],
        "rank": [{"clients": min(50, given.clients[-1]), "rank": r} for r in given.ranks],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, wanted in cells.items():
        for i, cell in enumerate(wanted):
            chosen = {"clients": cell["clients"], "cohort": min(50, cell["clients"]), "lora.rank": cell["rank"]}
            found.setdefault(name, []).append(cell | run({**base, **chosen}, folder / f"{name}-{i}"))
            print(f"{name} {cell[name]}: {found[name][-1]['wall']:.1f} s", flush=True)
    return found


HEAD = ("clients", "rank", "whole run", "before and after the rounds", "a round", "CPU time", "peak memory")


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """All runs in Markdown."""
    return markdown(HEAD, [_row(cell) for name in found for cell in found[name]])


def _row(cell: Mapping[str, float]) -> tuple[str, ...]:
    seconds = (f"{cell[key]:.1f} s" for key in ("wall", "start", "round", "cpu"))
    return (f"{cell['clients']:,}", f"{cell['rank']}", *seconds, f"{cell['peak'] / 1e6:.0f} MB")


def plot(found: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw seconds of a round and of the start, and memory, against clients and against the rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, (name, cells) in enumerate(found.items()):
        places = [cell[name] for cell in cells]
        for key, label in (("round", "a round"), ("start", "before and after the rounds")):
            axes[0][column].plot(places, [cell[key] for cell in cells], marker="o", label=label)
        axes[1][column].plot(places, [cell["peak"] / 1e6 for cell in cells], marker="o", color="black")
        axes[0][column].set(xscale="log", ylabel="seconds", ylim=(0, None), title=f"by {name}")
        axes[1][column].set(xscale="log", xlabel=name, ylabel="peak memory, MB", ylim=(0, None))
        axes[0][column].legend()
    figure.savefig(path)


def main() -> None:
    """Parse, run, print, draw."""
    given = arguments()
    with TemporaryDirectory() as name:
        folder = Path(name)
        model, _ = smoke.inputs("classify", folder, hidden_size=max(64, *given.ranks))
        write_rows(folder / "rows.csv", 400 if given.smoke else ROWS)
        base = {
            **SETTINGS,
            "engine": given.engine,
            "data.path": folder / "rows.csv",
            "model.path": given.model or model,
        }
        found = series(given, base, folder)
    given.out.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "settings": dict(SETTINGS), "engine": given.engine}
    (given.out / "growth.json").write_text(json.dumps(about | {"runs": found}, indent=1) + "\n")
    plot(found, given.out / "growth.svg")
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    print(table(found))


def arguments() -> argparse.Namespace:
    """The command line; the small form has two runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for growth.json and growth.svg")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--model", default="", help="folder of a model instead of the tiny one")
    parser.add_argument("--clients", type=_numbers, default=[10, 50, 200, 1000, 10_000])
    parser.add_argument("--ranks", type=_numbers, default=[4, 8, 16, 32, 64])
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.smoke:
        given.clients, given.ranks = [4], [4]
    return given


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
