"""Every strategy on SST-2's six label-skewed clients with MiniLM, each at a learning rate of its own.

    python -m benchmarks.sst2_all --model MINILM --data sst2 --out sst2.json

MINILM is as in banking77.toml; sst2 is a folder with client_*.jsonl and val.jsonl. A client holds out a twentieth of
its examples. On one half of these a short run with each rate of the grid is judged, by the mean of the clients' losses,
each with the model it would use (in so short a run accuracies hardly differ). The best rate is measured in a longer
run: on val.jsonl after every round, and at the end by the clients on the other half. What is in the file is not redone.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import sweep as kept
from benchmarks.sweep import Results, sweep
from fedlora import config as configuration
from fedlora.client.policy import own
from fedlora.config import Config
from fedlora.data.client_data import Site
from fedlora.data.rows import take
from fedlora.errors import ConfigError, FedloraError, nearest
from fedlora.metrics import spread
from fedlora.privacy.record_level import terms
from fedlora.run.client_ranks import ranks
from fedlora.run.compose import compose
from fedlora.run.console import size
from fedlora.run.plan import Plan
from fedlora.run.setup import Setup, prepare
from fedlora.sections import LoRAConfig
from fedlora.server.rounds import fit, split
from fedlora.simulations.serial import Serial
from fedlora.strategy import catalogue

GRID = (5e-3, 1.5e-2, 4e-2)
SHORT, LONG = 2, 5  # rounds of a run of the grid, and of the one that is measured
OWN = 60  # examples at most in each half of what a client holds out
SETTINGS: Mapping[str, Any] = {"data.holdout": 0.05, "train.batch_size": 8, "train.accumulate": 2, "train.steps": 8}
SMOKE: Mapping[str, Any] = {"rounds": 2, "train.steps": 1, "data.limit": 400, "data.eval_limit": 32}
TOML = Path(__file__).parents[1] / "simulations" / "sst2.toml"


@dataclass(frozen=True)
class Variant:
    """A line of the table: a strategy, and what it is run with beside sst2.toml."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = GRID

    @property
    def strategy(self) -> str:
        return self.name.partition(":")[0]


BESIDE = (
    Variant("ffa_lora:orthonormal", {"option.orthonormal": True}),
    Variant("fedex_lora:rank=8", {"option.rank": 8}),
    Variant("fedex_lora:reinit", {"option.assignment": "reinit"}),
    Variant("fedex_lora:keep", {"option.assignment": "keep"}),
    Variant("fed_sb:r=64", {"lora.rank": 64, "lora.alpha": 128.0}),  # s as it is for rank 8
    Variant("fedsa_lora:rslora", {"lora.rslora": True}),
    Variant("fedsa_lora:vera", {"lora.kind": "vera", "lora.rank": 256}, (5e-3, 2e-2, 8e-2)),
    *(
        Variant(f"{name}:mixed", {"lora.ranks": "2,4,4,8,8,8"})
        for name in ("flora", "flexlora", "hetlora", "fslora", "florist")
    ),
)


@dataclass(frozen=True)
class Place:
    """What all runs have in common."""

    model: str
    data: str
    threads: int
    smoke: bool


@dataclass(frozen=True)
class Run:
    """One run of a variant: of the grid, or the one that is measured."""

    variant: Variant
    lr: float
    final: bool = False

    @property
    def line(self) -> str:
        return self.variant.name

    @property
    def name(self) -> str:
        return "final" if self.final else f"{self.lr:g}"


def variants(only: Sequence[str]) -> list[Variant]:
    """The catalogue as it is, then the variants of interest; of these those that are named."""
    plain = [Variant(name) for name in dict.fromkeys(entry.name for entry in catalogue())]
    known = [*plain, *(v for v in BESIDE if v.strategy in {p.name for p in plain})]
    names = {v.name for v in known}
    for name in only:
        if name not in names:
            raise ConfigError(f'--only: there is no "{name}"; {nearest(name, names)}')
    return [v for v in known if not only or v.name in only]


def ready(chosen: Sequence[Variant], results: Results) -> Iterator[Run]:
    """The runs that are not done, in order; a measured one when all of its grid are."""
    for variant in chosen:
        done = results.get(variant.name, {})
        missing = [run for lr in variant.rates if (run := Run(variant, lr)).name not in done]
        yield from missing
        rate = best_rate(done)
        if not missing and rate and "final" not in done:
            yield Run(variant, rate, final=True)


def best_rate(done: Mapping[str, Mapping[str, Any]]) -> float:
    """The rate with the lowest mean of the clients' losses, the lowest rate of several; 0 where all have failed."""
    judged = {run["lr"]: run["own"]["loss"] for name, run in done.items() if name != "final" and "own" in run}
    return min(sorted(judged), key=lambda lr: judged[lr], default=0.0)


def measure(place: Place, run: Run) -> dict[str, Any]:
    """Do one run in this process."""
    rounds = LONG if run.final else SHORT
    chosen = {"strategy": run.variant.strategy, "train.lr": run.lr, "rounds": rounds}
    return {"lr": run.lr, **carry_out(place, config_of(place, chosen, run.variant.settings), run.final)}


def carry_out(place: Place, config: Config, final: bool, most: int = OWN, head: float = 1.0) -> dict[str, Any]:
    """What comes of a run: its rounds, and how good each client's model is on `most` at most of its own examples.

    A head that is new starts at so many times what transformers draws.
    """
    began = time.monotonic()
    setup = _setup(place, replace(config.lora, ranks=""))
    sites = _sites(place, final, most)
    theirs = ranks(
        config.lora.ranks,
        largest=config.lora.rank,
        clients=len(sites),
        seed=config.seed,
        memory=setup.model.memory,
    )
    start = replace(setup.start, H={m: head * h for m, h in setup.start.H.items()})
    strategy = compose(config, start, theirs)
    with TemporaryDirectory() as folder:
        fleet = Serial(setup.model, sites, theirs, Path(folder), own=own(config))
        plan = Plan(
            rounds=config.rounds,
            cohort=config.cohort,
            seed=config.seed,
            training=config.train,
            policy=config.server,
            evaluate=setup.evaluate if final else None,
            exactness=setup.model.scales if final and config.lora.kind == "lora" else None,
            terms=terms(config.dp, config.train, config.rounds, fleet.clients()) if config.dp.by_record else None,
        )
        rounds = list(fit(strategy, fleet, start, plan))
        # Not by the plan: an evaluation of clients in every round would be counted as traffic of the training.
        last = rounds[-1].state
        jobs = {c.id: replace(strategy.client_init(last, c), round=config.rounds - 1) for c in fleet.clients()}
        judged = split(jobs, fleet.evaluate(jobs))[0]
        noise = [plan.terms.of(c).noise for c in fleet.clients()] if plan.terms else []
    told = spread(judged) | {"loss": fmean(m.loss / m.targets for m in judged.values())}
    personal = any(set(job.trains) - set(job.shares) for job in jobs.values())
    records = [done.record() for done in rounds]
    found = {"own": told, "personal": personal, "rounds": records, "seconds": round(time.monotonic() - began, 1)}
    return found | ({"noise": noise} if noise else {})


def config_of(place: Place, *layers: Mapping[str, Any]) -> Config:
    """What all runs have in common, under these settings."""
    return configuration.build(
        configuration.read(TOML),
        {"model.path": place.model, "threads": place.threads},
        {"data.path": f"{place.data}/client_*.jsonl", "data.eval": f"{place.data}/val.jsonl"},
        SETTINGS,
        *layers,
        SMOKE if place.smoke else {},
    )


@cache
def _setup(place: Place, lora: LoRAConfig) -> Setup:
    """The model with this adapter: a process makes each once, and encodes the examples once for all."""
    return prepare(replace(config_of(place), lora=lora))


@cache
def _sites(place: Place, final: bool, most: int) -> tuple[Site, ...]:
    """The clients with one half of what they hold out: that to choose a rate by, or that to measure on."""

    def half(site: Site) -> Site:
        return replace(site, heldout_rows=take(site.heldout_rows, range(int(final), len(site.heldout_rows), 2)[:most]))

    return tuple(half(site) for site in _setup(place, config_of(place).lora).sites)


def run_all(place: Place, chosen: Sequence[Variant], out: Path, jobs: int) -> Results:
    """Do every run that is not in the file, `jobs` at a time, and write the file after each."""
    return sweep(partial(ready, chosen), partial(measure, place), _said, (out, _settings(place)), jobs)


def load(out: Path, place: Place) -> Results:
    """The results there are, without the runs that failed. Raises `ConfigError` for those of other settings."""
    return kept.load(out, _settings(place))


def save(out: Path, place: Place, results: Results) -> None:
    """Write the results, so that at any moment the file is whole."""
    kept.save(out, _settings(place), results)


def _settings(place: Place) -> dict[str, Any]:
    """What all results of a file were made with, wherever model and data lie."""
    rounds = {"rounds of the grid": SHORT, "rounds": LONG, "own": OWN}
    return {**configuration.read(TOML), **SETTINGS, **rounds, **(SMOKE if place.smoke else {})}


def _said(run: Run, done: Mapping[str, Any]) -> str:
    what = "measured" if run.final else "tried"
    own = "clients' own loss {loss:.4f}, accuracy {mean:.4f}".format(**done.get("own", {"loss": 0.0, "mean": 0.0}))
    said = done.get("error") or f"{own} in {done['seconds']:.0f} s"
    return f"{run.variant.name} at {run.lr:g}, {what}: {said}"


def table(chosen: Sequence[Variant], results: Results) -> str:
    """The measured runs in Markdown; a rate at an end of its grid has a star, for a better one may lie beyond."""
    head = "strategy", "rate", "val, last round", "val, best round", "clients' own", "distance", "up", "down", "seconds"
    rows = [head, tuple("---" for _ in head)]
    for variant in chosen:
        done = results.get(variant.name, {}).get("final", {"error": "not run"})
        rows.append((variant.name, done["error"], *[""] * 7) if "error" in done else _row(variant, done))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(variant: Variant, done: Mapping[str, Any]) -> tuple[str, ...]:
    rounds = done["rounds"]
    accuracy = [record["eval"]["accuracy"] for record in rounds]
    best = max(range(len(rounds)), key=lambda t: accuracy[t])
    distance = rounds[-1].get("exactness")
    steady = rounds[1:] or rounds  # in the first round clients are sent what stays the same
    up, down = (size(round(fmean(record[f"bytes_{way}"] for record in steady))) for way in ("up", "down"))
    return (
        variant.name,
        f"{done['lr']:g}{'*' if done['lr'] in (min(variant.rates), max(variant.rates)) else ''}",
        "" if done["personal"] else f"{100 * accuracy[-1]:.1f}",
        "" if done["personal"] else f"{100 * accuracy[best]:.1f} ({best + 1})",
        f"{100 * done['own']['mean']:.1f}",
        "" if distance is None else f"{distance:.1e}",
        up,
        down,
        f"{done['seconds']:.0f}",
    )


def main() -> None:
    """Parse, run, print."""
    place, only, out, jobs = arguments(__doc__ or "")
    try:
        chosen = variants(only)
        if place.smoke:
            chosen = [replace(v, rates=v.rates[:1]) for v in chosen]
        results = run_all(place, chosen, out, jobs)
    except FedloraError as e:
        raise SystemExit(str(e)) from e
    print(table(chosen, results))


def arguments(about: str) -> tuple[Place, list[str], Path, int]:
    """What is given on the command line: the place, the lines that are wanted, the file, and how many processes."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder with client_*.jsonl and val.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="file of results, which is gone on with")
    parser.add_argument("--only", default="", help="lines of the table, with commas between")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; each has its own model")
    parser.add_argument("--smoke", action="store_true", help="see that everything runs: one step a round")
    given = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    threads = max(1, (os.cpu_count() or 1) // given.jobs)
    place = Place(given.model, str(given.data.absolute()), threads, given.smoke)
    return place, [name for name in given.only.split(",") if name], given.out, given.jobs


if __name__ == "__main__":
    main()
