"""The same federated job by every engine, and by a plain Flower app: time with start-up, CPU time and memory.

    python -m benchmarks.like_for_like minilm --model MINILM --data banking77 --out like_for_like.json
    python -m benchmarks.like_for_like smollm2 --model SMOLLM2 --data gsm8k --out like_for_like.json
    python -m benchmarks.like_for_like embedded --out like_for_like.json
    python -m benchmarks.like_for_like private --model MINILM --data banking77 --out like_for_like.json

Every line of the table is a command of its own, from its start to its end; the commands take turns, `--repeats` times.
`--neighbours 2` runs two busy processes beside them. Runs that are in the file are not repeated. `--smoke` does a job
of seconds with a tiny model of its own, without dropout and by plain gradient descent, and checks that all engines come
to the same adapter.

minilm: 50 clients, all in every round, BANKING77 dealt out at random, rank 8 on query and value, 10 steps of 8, 3
rounds, one evaluation on 100 texts at the end. smollm2: the language model on GSM8K, 10 clients, 2 steps of 4, 2
rounds. embedded: `fedlora simulate`. private: minilm by DP-SGD, its engines against the stacked run without it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import torch
from safetensors.torch import load_file

from benchmarks import smoke
from benchmarks.process_usage import busy_neighbours, machine, measure
from benchmarks.sweep import Results, sweep
from benchmarks.tables import markdown
from fedlora.config import Config
from fedlora.errors import FedloraError
from fedlora.run.directory import RunDirectory

LIMIT = 3600.0  # seconds that a command may take
CLOSE = 1e-4  # how far adapters of two engines may be apart, relative to the adapter, in the small form


@dataclass(frozen=True)
class Engine:
    """A line of the table: fedlora with an engine and some settings, or the plain Flower app."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    peer: bool = False


@dataclass(frozen=True)
class Workload:
    """A job that all engines do."""

    engines: tuple[Engine, ...]  # the first is the one that the others are compared with
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, str] = ("", "")  # training and evaluation data, in the folder that the command line names


STACKED = Engine("stacked", {"engine": "stacked"})
SERIAL = Engine("serial", {"engine": "serial"})
FLOWER = Engine("flower", {"engine": "flower"})
PLAIN = Engine("plain Flower app", peer=True)
KEPT = Engine("plain Flower app that keeps its model", {"keep-model": True}, peer=True)
BFLOAT16 = Engine("stacked, bf16", {"engine": "stacked", "precision": "bf16"})
ALL = STACKED, BFLOAT16, SERIAL, FLOWER, PLAIN, KEPT

MINILM: dict[str, Any] = {
    "clients": 50,
    "cohort": 50,
    "rounds": 3,
    "data.partition": "iid",
    "data.eval_limit": 100,
    "server.eval_every": 3,
    "model.max_length": 64,
    "lora.targets": "query,value",
    "train.lr": 2e-3,
    "train.steps": 10,
    "train.batch_size": 8,
}
SMOLLM2: dict[str, Any] = MINILM | {
    "clients": 10,
    "cohort": 10,
    "rounds": 2,
    "server.eval_every": 2,
    "model.max_length": 320,
    "lora.targets": "q_proj,v_proj",
    "train.steps": 2,
    "train.batch_size": 4,
}
NOISE: Mapping[str, Any] = {"dp.noise": 1.0}
BANKING77 = "train.csv", "test.csv"
WORKLOADS = {
    "minilm": Workload(ALL, MINILM, BANKING77),
    "smollm2": Workload(ALL, SMOLLM2, ("train.jsonl", "test.jsonl")),
    "embedded": Workload((STACKED, SERIAL, FLOWER)),
    "private": Workload(
        (
            STACKED,
            Engine("stacked, private", {**NOISE, **STACKED.settings}),
            Engine("serial, private", {**NOISE, **SERIAL.settings}),
        ),
        MINILM,
        BANKING77,
    ),
}
SMOKE: Mapping[str, Any] = {
    "clients": 3,
    "cohort": 3,
    "rounds": 2,
    "data.limit": 60,
    "data.eval_limit": 8,
    "server.eval_every": 2,
    "train.optimizer": "sgd",
    "train.lr": 0.1,
    "train.steps": 2,
    "train.batch_size": 2,
    "model.max_length": 32,
    "threads": 1,
}
PEER_OPTIONS = {  # of the plain app, by fedlora's settings
    "clients": "--clients",
    "rounds": "--rounds",
    "data.eval_limit": "--eval-limit",
    "model.max_length": "--max-length",
    "lora.targets": "--targets",
    "train.lr": "--lr",
    "train.steps": "--steps",
    "train.batch_size": "--batch-size",
}


@dataclass(frozen=True)
class Place:
    """Where model and data are, and how large the job is."""

    workload: str
    model: str
    data: str
    neighbours: int
    smoke: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the job, for all engines."""
        job = WORKLOADS[self.workload]
        files = dict(zip(("data.path", "data.eval"), (f"{self.data}/{f}" for f in job.files), strict=True))
        named = {"model.path": self.model, **files} if self.data else {}
        return {**job.settings, **named, **(SMOKE if self.smoke else {})}


@dataclass(frozen=True)
class Turn:
    """One command: an engine's, for the n-th time."""

    engine: Engine
    line: str  # job, neighbours and engine
    name: str  # which repetition


def turns(place: Place, engines: Sequence[Engine], repeats: int) -> list[Turn]:
    """All commands, in turn: every engine once before any has its second."""
    beside = f", {place.neighbours} busy neighbours" if place.neighbours else ""
    return [Turn(e, f"{place.workload}{beside}: {e.name}", str(n)) for n in range(repeats) for e in engines]


def ready(wanted: Sequence[Turn], results: Results) -> Iterator[Turn]:
    """Yield the turns that were not taken."""
    yield from (turn for turn in wanted if turn.name not in results.get(turn.line, {}))


def run(place: Place, turn: Turn) -> dict[str, Any]:
    """Run an engine's command, and return what it used and what it came to."""
    with TemporaryDirectory() as folder, busy_neighbours(place.neighbours):
        out = Path(folder) / "run"
        command = _peer(place, turn.engine) if turn.engine.peer else _fedlora(place, turn.engine, out)
        usage, text = measure(command, {}, LIMIT)
        if turn.engine.peer:
            return {**usage.record(), "eval": json.loads(text.strip().splitlines()[-1])}
        records = RunDirectory(out).records()
        saved = out / "adapter" / "adapter_model.safetensors"
        kept = {"adapter": adapter_sample(saved)} if place.smoke else {}
        return {**usage.record(), "eval": records[-1].get("eval", {}), **kept}


def adapter_sample(path: Path) -> list[float]:
    """A thousand numbers of an adapter's file or a few more, evenly spread."""
    tensors = load_file(path)
    numbers = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
    return [float(x) for x in numbers[:: max(1, len(numbers) // 1000)]]


def _fedlora(place: Place, engine: Engine, out: Path) -> list[str]:
    settings = {**place.settings, **engine.settings}
    options = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "fedlora", "simulate", "--out", str(out), *options]


def _peer(place: Place, engine: Engine) -> list[str]:
    settings = place.settings
    named = ["--model", place.model, "--data", settings["data.path"], "--eval-data", settings["data.eval"]]
    options = [word for key, option in PEER_OPTIONS.items() for word in (option, str(settings[key]))]
    return [sys.executable, "-m", "benchmarks.peers", *named, *options, *(["--keep-model"] if engine.settings else [])]


def exists(engine: Engine) -> bool:
    """Whether this version has the engine and every setting of it, and this processor bf16 instructions if it is bf16.

    Without such instructions a product in bf16 takes ten times as long and more.
    """
    if engine.settings.get("precision") == "bf16" and machine()["bf16 instructions"] == "no":
        return False
    hints = get_type_hints(Config)
    chosen = {key: value for key, value in engine.settings.items() if "." not in key}
    return engine.peer or all(value in get_args(hints.get(key)) for key, value in chosen.items())


HEAD = ("", "wall s: min, median, max", "CPU s", "peak memory", "wall", "CPU", "loss", "accuracy")


def table(results: Results, wanted: Sequence[Turn]) -> str:
    """The lines in Markdown; the ratios are medians over turns, of a line's figure over the first line's."""
    lines = dict.fromkeys(turn.line for turn in wanted)
    first = results.get(next(iter(lines)), {})
    return markdown(HEAD, [_row(line, results.get(line, {}), first) for line in lines])


def _row(line: str, runs: Mapping[str, Mapping[str, Any]], first: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    done = [r for r in runs.values() if "error" not in r]
    if not done:
        return (line, next((r["error"][:80] for r in runs.values()), "not run"), *[""] * (len(HEAD) - 2))
    walls = [r["wall"] for r in done]
    scores = done[-1]["eval"]
    return (
        line,
        f"{min(walls):.1f}, {median(walls):.1f}, {max(walls):.1f}",
        f"{median(r['cpu'] for r in done):.1f}",
        f"{median(r['peak'] for r in done) / 1e6:.0f} MB",
        _ratio(runs, first, "wall"),
        _ratio(runs, first, "cpu"),
        f"{scores.get('loss', float('nan')):.3f}",
        f"{100 * scores['accuracy']:.0f} %" if "accuracy" in scores else "",
    )


def _ratio(runs: Mapping[str, Mapping[str, Any]], first: Mapping[str, Mapping[str, Any]], key: str) -> str:
    both = [n for n in runs if n in first and "error" not in {**runs[n], **first[n]}]
    return f"{median(runs[n][key] / first[n][key] for n in both):.2f}" if both else ""


def disagreement(results: Results, wanted: Sequence[Turn]) -> str:
    """The lines whose adapters are not the serial engine's, with the distance; empty where all agree."""
    adapters = _adapters(results, [turn for turn in wanted if _is_exact(turn.engine)])
    reference = [adapter for line, adapter in adapters.items() if line.endswith(": serial")]
    apart = {line: _distance(adapter, serial) for line, adapter in adapters.items() for serial in reference}
    return "; ".join(f"{line} is {d:.1e} from serial" for line, d in apart.items() if not d <= CLOSE)


def _adapters(results: Results, wanted: Sequence[Turn]) -> dict[str, list[float]]:
    """What each line's run came to, where it did."""
    records = {turn.line: results.get(turn.line, {}).get(turn.name, {}) for turn in wanted}
    return {line: record["adapter"] for line, record in records.items() if "adapter" in record}


def _is_exact(engine: Engine) -> bool:
    return not engine.peer and not {"precision", "dp.noise"} & set(engine.settings)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The norm of the difference over that of b."""
    return float((sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / sum(y * y for y in b)) ** 0.5)


def main() -> None:
    """Parse, measure, print; end with an error where engines disagree."""
    given = arguments()
    with TemporaryDirectory() as folder:
        compare(place_of(given, Path(folder)), given)


def compare(place: Place, given: argparse.Namespace) -> None:
    """Take all turns, and print the table."""
    chosen = [e for e in WORKLOADS[place.workload].engines if not given.only or e.name in given.only.split(";")]
    wanted = turns(place, list(filter(exists, chosen)), 1 if place.smoke else given.repeats)
    settings = {"machine": machine(), "smoke": place.smoke, "jobs": {k: dict(w.settings) for k, w in WORKLOADS.items()}}
    try:
        results = sweep(partial(ready, wanted), partial(run, place), _said, (given.out, settings), jobs=1)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    print(table(results, wanted))
    if place.smoke and (wrong := disagreement(results, wanted)):
        raise SystemExit(wrong)


def _said(turn: Turn, done: Mapping[str, Any]) -> str:
    if "error" in done:
        return f"{turn.line}: {done['error']}"
    return f"{turn.line}: {done['wall']:.1f} s, {done['cpu']:.1f} s of CPU time, load before {done['load']:.1f}"


def place_of(given: argparse.Namespace, folder: Path) -> Place:
    """Where model and data are; in the small form they are made, in a folder."""
    name, model, data = given.workload, given.model, str(given.data.absolute()) if given.data else ""
    if given.smoke and WORKLOADS[name].settings:
        model, data = smoke.inputs("lm" if name == "smollm2" else "classify", folder)
    return Place(name, model, data, given.neighbours, given.smoke)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--model", default="", help="folder of the model, as benchmarks.models writes it")
    parser.add_argument("--data", type=Path, default=None, help="folder with the data's two files")
    parser.add_argument("--neighbours", type=int, default=0, help="busy processes beside every command")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="lines of the table, with semicolons between")
    parser.add_argument("--out", type=Path, required=True, help="file of results, which is gone on with")
    parser.add_argument("--smoke", action="store_true", help="a job of seconds, and a check that engines agree")
    return parser.parse_args()


if __name__ == "__main__":
    main()
