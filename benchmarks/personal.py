r"""A model for each client: the common one, what each makes of it by itself, what strategies keep with clients, alone.

    python -m benchmarks.personal --config benchmarks/personal_sst2.toml --model MINILM --data 'sst2/client_*.jsonl' \
        --steps 8 --out personal.json

Every client holds out a fifth of its rows. One half of these chooses, the other one measures. Each method is run with
every rate of the grid, and after its rounds every client goes on by itself from the model that it has, for `--steps`
steps, once for each lambda of Ditto's term. A row of the table has the rate with which its mean is best on the
half that chooses; it shows accuracies (perplexities, of a language model) on the other half: the mean over clients, the
worst client, the spread, and how many clients were better off before their own steps. Mean and standard deviation over
the seeds. Runs that are in the file already are not repeated.

Alone: a client trains as many steps as all rounds have, from the pretrained model. Nothing of others is in it.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.sweep import Results, sweep
from fedlora import config as configuration
from fedlora.client.policy import policy_of
from fedlora.config import Config
from fedlora.data.rows import take
from fedlora.encoding.client_data import ClientData
from fedlora.errors import ConfigError, FedloraError
from fedlora.run.compose import compose
from fedlora.run.plan import Plan
from fedlora.run.setup import prepare
from fedlora.server.personal import personalise
from fedlora.server.rounds import fit
from fedlora.simulations.stacked import Stacked

GRID = (5e-3, 1.5e-2, 4e-2)
PROX = (0.0, 0.1, 1.0)  # lambda of Ditto's term
HELD_OUT = 0.2
METHODS: Mapping[str, Mapping[str, Any]] = {
    "common (fedavg)": {"strategy": "fedavg", "personal.alone": True},
    "fedsa_lora": {"strategy": "fedsa_lora"},
    "dual": {"strategy": "dual", "option.local": 2},
    "local head": {"strategy": "fedavg", "model.head": "local"},
}
SMOKE: Mapping[str, Any] = {"clients": 3, "cohort": 3, "rounds": 2, "train.steps": 1, "data.limit": 60}
HEAD = ("model of each client", "rate", "mean", "worst client", "spread over clients", "better off before")


@dataclass(frozen=True)
class Place:
    """What all runs have in common."""

    settings: tuple[tuple[str, Any], ...]  # by dotted key
    steps: int  # of each client by itself
    smoke: bool

    def config(self, *layers: Mapping[str, Any]) -> Config:
        """The settings of a run: these, and the layers over them."""
        own = {"data.holdout": HELD_OUT, "personal.steps": self.steps}
        return configuration.over_defaults(
            {**dict(self.settings), **own, **(SMOKE if self.smoke else {})}, _over(layers)
        )


def _over(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for layer in layers for key, value in layer.items()}


@dataclass(frozen=True)
class MethodRun:
    """One run of a method: to choose by, or of those that are measured."""

    line: str  # the method
    lr: float
    seed: int
    measures: bool

    @property
    def name(self) -> str:
        return f"{'measured' if self.measures else 'chosen by'} {self.lr:g} {self.seed}"


def measure(place: Place, run: MethodRun) -> dict[str, Any]:
    """Do one run in this process; the figures of every row that it is for."""
    config = place.config(METHODS[run.line], {"train.lr": run.lr, "seed": run.seed})
    setup = prepare(config)
    config = setup.config
    if config.model.head == "local" and not setup.start.H:
        raise ConfigError("this model has no head that a client could keep")
    clients_data = [_half(data, run.measures) for data in setup.clients_data]
    strategy = compose(config, setup.start, setup.ranks)
    plan = Plan(
        rounds=config.rounds,
        cohort=config.cohort,
        seed=config.seed,
        training=config.train,
        policy=replace(config.server, eval_clients=0),
        evaluate_clients=True,
        personal=config.personal,
    )
    with TemporaryDirectory() as folder:
        fleet = Stacked(setup.model, clients_data, setup.ranks, Path(folder), policy=policy_of(config))
        silent = replace(plan, evaluate_clients=False)
        state = list(fit(strategy, fleet, setup.start, silent))[-1].state
        rows: dict[str, Any] = {}
        for prox in PROX:
            asked = replace(config.personal, prox=prox, alone=config.personal.alone and prox == PROX[0])
            told = personalise(strategy, state, fleet, setup.start, replace(plan, personal=asked), config.rounds)
            rows |= _rows(told, prox)
    return {"lr": run.lr, "seed": run.seed, "rows": rows}


def _half(data: ClientData, second: bool) -> ClientData:
    """The client with every other one of the rows that it holds out."""
    return replace(data, heldout_rows=take(data.heldout_rows, range(int(second), len(data.heldout_rows), 2)))


def _rows(told: Mapping[str, Any], prox: float) -> dict[str, Any]:
    """The figures that a stage brings, by the ends of the rows' names."""
    called = {
        "before": "",
        "personal": f" + {told['steps']} steps" + (f", lambda {prox:g}" if prox else ""),
        "alone": "alone",
    }
    rows, lost = told.get("rows", {}), told.get("lost", {})
    return {called[row]: {**figures, "lost": len(lost.get(row, ()))} for row, figures in rows.items()}


def ready(place: Place, seeds: int, results: Results) -> Iterator[MethodRun]:
    """Yield the runs that can be done now: all that choose, then those that measure at a rate that some row chose."""
    for method in METHODS:
        done = results.get(method, {})
        chosen_by = [MethodRun(method, lr, 0, measures=False) for lr in rates(place)]
        waiting = [run for run in chosen_by if run.name not in done]
        if not waiting:
            wanted = sorted({*best_rates(done).values()})
            runs = [MethodRun(method, lr, seed, measures=True) for lr in wanted for seed in range(seeds)]
            waiting = [run for run in runs if run.name not in done]
        yield from waiting


def rates(place: Place) -> tuple[float, ...]:
    """The grid of learning rates."""
    return GRID[:1] if place.smoke else GRID


def best_rates(done: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The rate of every row: of those that choose, the one with which its mean is best."""
    best: dict[str, tuple[float, float]] = {}
    for run in (run for name, run in done.items() if name.startswith("chosen by") and "rows" in run):
        for row, figures in run["rows"].items():
            sign = -1.0 if figures["metric"] in ("loss", "perplexity") else 1.0
            best[row] = max(best.get(row, (-float("inf"), 0.0)), (sign * figures["mean"], -run["lr"]))
    return {row: -lr for row, (_, lr) in best.items()}


def table(results: Results) -> str:
    """The measured rows in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for method in METHODS:
        done = results.get(method, {})
        for row, lr in best_rates(done).items():
            lines.append(_line(method, row, lr, [r for n, r in done.items() if n.startswith(f"measured {lr:g} ")]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(method: str, row: str, lr: float, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    name = row if row == "alone" else f"{method}{row}"
    figures = [run["rows"][row] for run in runs if row in run.get("rows", {})]
    if not figures:
        return (name, f"{lr:g}", *["not run"] * (len(HEAD) - 2))
    mean, worst, spread = (_over_seeds([f[key] for f in figures]) for key in ("mean", "worst", "std"))
    lost = f"{fmean(f['lost'] for f in figures):.1f} of {figures[0]['clients']}" if "+" in row else ""
    return (name, f"{lr:g}{'*' if lr in (GRID[0], GRID[-1]) else ''}", mean, worst, spread, lost)


def _over_seeds(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {pstdev(values):.4f}" if len(values) > 1 else "")


def _said(run: MethodRun, done: Mapping[str, Any]) -> str:
    if "error" in done:
        return f"{run.line}, {run.name}: {done['error']}"
    means = ", ".join(f"{row.strip() or 'after the rounds'} {f['mean']:.4f}" for row, f in done["rows"].items())
    return f"{run.line}, {run.name}: {means}"


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    given = _parser().parse_args(words)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    settings = configuration.read(given.config) if given.config else {}
    paths = {"model.path": given.model, "data.path": given.data}
    threads = {"threads": max(1, (os.cpu_count() or 1) // given.jobs)}
    named = {**settings, **{key: value for key, value in paths.items() if value}, **threads}
    place = Place(tuple(named.items()), 2 if given.smoke else given.steps, given.smoke)
    file = given.out, {**settings, "steps": place.steps, "smoke": place.smoke}
    todo = partial(ready, place, 1 if given.smoke else given.seeds)
    try:
        results = sweep(todo, partial(measure, place), _said, file, given.jobs)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(table(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="a run's settings, as simulations/sst2.toml")
    parser.add_argument("--model", default="", help="folder of the base model")
    parser.add_argument("--data", default="", help="data, written as data.path is")
    parser.add_argument("--steps", type=int, default=20, help="steps of each client by itself")
    parser.add_argument("--seeds", type=int, default=3, help="runs that are measured, of each row")
    parser.add_argument("--out", type=Path, required=True, help="file of results, which is gone on with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; each has its own model")
    parser.add_argument("--smoke", action="store_true", help="see that everything runs")
    return parser


if __name__ == "__main__":
    main()
