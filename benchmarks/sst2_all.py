"""Every strategy on SST-2's six label-skewed clients with MiniLM, each at a learning rate of its own.

    python -m benchmarks.sst2_all --model MINILM --data sst2 --out sst2.json

MINILM is as in banking77.toml; sst2 is a folder with client_*.jsonl and val.jsonl. A client holds out a twentieth of
its examples. On one half of these a short run with each rate of the grid is judged, by the mean of the clients' losses,
each with the model it would use (in so short a run accuracies hardly differ). The best rate is measured in a longer
run: on val.jsonl after every round, and at the end by the clients on the other half. Runs that are in the file already
are not repeated.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import sweep as kept
from benchmarks.sweep import Results, sweep
from fedlora import config as configuration
from fedlora.client.policy import policy_of
from fedlora.config import Config
from fedlora.data.rows import take
from fedlora.encoding.client_data import ClientData
from fedlora.errors import ConfigError, FedloraError, nearest
from fedlora.metrics import spread
from fedlora.privacy.record_level import record_level_dp
from fedlora.run.client_ranks import ranks
from fedlora.run.compose import compose
from fedlora.run.console import size
from fedlora.run.plan import Plan
from fedlora.run.setup import RunSetup, prepare
from fedlora.sections import LoRAConfig
from fedlora.server.rounds import answers_and_failures, fit
from fedlora.simulations.serial import Serial
from fedlora.strategy import Strategy, catalogue

GRID = (5e-3, 1.5e-2, 4e-2)
SHORT, LONG = 2, 5  # rounds of a run of the grid, and of the one that is measured
OWN = 60  # examples at most in each half of what a client holds out
SETTINGS: Mapping[str, Any] = {"data.holdout": 0.05, "train.batch_size": 8, "train.accumulate": 2, "train.steps": 8}
SMOKE: Mapping[str, Any] = {"rounds": 2, "train.steps": 1, "data.limit": 400, "data.eval_limit": 32}
TOML = Path(__file__).parents[1] / "simulations" / "sst2.toml"


@dataclass(frozen=True)
class Variant:
    """A line of the table: a strategy, and its settings beside those of sst2.toml."""

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
    """The model, the data and the machine, which all runs have in common."""

    model: str
    data: str
    threads: int
    smoke: bool


@dataclass(frozen=True)
class GridRun:
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
    """The strategies of the catalogue as they are, then the variants of interest; of these those that `only` names."""
    plain = [Variant(name) for name in dict.fromkeys(entry.name for entry in catalogue())]
    strategies = {variant.name for variant in plain}
    known = [*plain, *(variant for variant in BESIDE if variant.strategy in strategies)]
    check_only(only, {variant.name for variant in known})
    return [variant for variant in known if not only or variant.name in only]


def check_only(only: Sequence[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that no line of the table has."""
    for name in only:
        if name not in known:
            raise ConfigError(f'--only: there is no "{name}"; {nearest(name, known)}')


def ready(chosen: Sequence[Variant], results: Results) -> Iterator[GridRun]:
    """Yield the runs that can be done now, in order; a measured one once all of its grid are done."""
    for variant in chosen:
        yield from _next_runs(variant, results.get(variant.name, {}))


def _next_runs(variant: Variant, done: Mapping[str, Mapping[str, Any]]) -> list[GridRun]:
    grid = [GridRun(variant, lr) for lr in variant.rates]
    untried = [run for run in grid if run.name not in done]
    if untried or "final" in done:
        return untried
    rate = best_rate(done)
    return [GridRun(variant, rate, final=True)] if rate else []


def best_rate(done: Mapping[str, Mapping[str, Any]]) -> float:
    """The rate with the lowest mean of the clients' losses, the lowest rate of several; 0 where all have failed."""
    judged = {run["lr"]: run["own"]["loss"] for name, run in done.items() if name != "final" and "own" in run}
    return min(sorted(judged), key=lambda lr: judged[lr], default=0.0)


def measure(place: Place, run: GridRun) -> dict[str, Any]:
    """Do one run in this process, and return its record."""
    rounds = LONG if run.final else SHORT
    chosen = {"strategy": run.variant.strategy, "train.lr": run.lr, "rounds": rounds}
    return {"lr": run.lr, **carry_out(place, config_of(place, chosen, run.variant.settings), run.final)}


def carry_out(place: Place, config: Config, final: bool, most: int = OWN, head: float = 1.0) -> dict[str, Any]:
    """The record of a run: its rounds, and how good each client's model is on at most `most` of its own examples.

    A new head starts at `head` times what transformers draws.
    """
    began = time.monotonic()
    setup = _setup(place, replace(config.lora, ranks=""))
    clients_data = _clients_data(place, final, most)
    client_ranks = ranks(
        config.lora.ranks,
        largest=config.lora.rank,
        clients=len(clients_data),
        seed=config.seed,
        memory=setup.model.memory,
    )
    start = replace(setup.start, H={m: head * h for m, h in setup.start.H.items()})
    strategy = compose(config, start, client_ranks)
    with TemporaryDirectory() as folder:
        fleet = Serial(setup.model, clients_data, client_ranks, Path(folder), policy=policy_of(config))
        plan = _plan(config, setup, fleet, final)
        rounds = list(fit(strategy, fleet, start, plan))
        record = _judged(strategy, rounds[-1].state, fleet, config.rounds - 1)
    record |= {"rounds": [done.record() for done in rounds], "seconds": round(time.monotonic() - began, 1)}
    if plan.record_level:
        record["noise"] = [plan.record_level.terms_for(client).noise for client in fleet.clients()]
    return record


def _plan(config: Config, setup: RunSetup, fleet: Serial, final: bool) -> Plan:
    """The plan of a run; only the one that is measured is evaluated after every round."""
    return Plan(
        rounds=config.rounds,
        cohort=config.cohort,
        seed=config.seed,
        training=config.train,
        policy=config.server,
        evaluate=setup.evaluate if final else None,
        exactness=setup.model.scales if final and config.lora.kind == "lora" else None,
        record_level=record_level_dp(config.dp, config.train, config.rounds, fleet.clients())
        if config.dp.by_record
        else None,
    )


def _judged(strategy: Strategy[Any], state: Any, fleet: Serial, t: int) -> dict[str, Any]:
    """How good each client's model is on what the client holds out, and whether a part of it never leaves the client.

    The plan has no such evaluation, since its traffic would be counted as that of the training.
    """
    jobs = {c.id: replace(strategy.client_init(state, c), round=t) for c in fleet.clients()}
    metrics, _ = answers_and_failures(jobs, fleet.evaluate(jobs))
    loss = fmean(m.loss / m.targets for m in metrics.values())
    personal = any(set(job.trains) - set(job.shares) for job in jobs.values())
    return {"own": spread(metrics) | {"loss": loss}, "personal": personal}


def config_of(place: Place, *layers: Mapping[str, Any]) -> Config:
    """The settings that all runs have in common, with these layers over them."""
    return configuration.build(
        configuration.read(TOML),
        {"model.path": place.model, "threads": place.threads},
        {"data.path": f"{place.data}/client_*.jsonl", "data.eval": f"{place.data}/val.jsonl"},
        SETTINGS,
        *layers,
        SMOKE if place.smoke else {},
    )


@cache
def _setup(place: Place, lora: LoRAConfig) -> RunSetup:
    """The model with this adapter, and the encoded examples; a process makes each once."""
    return prepare(replace(config_of(place), lora=lora))


@cache
def _clients_data(place: Place, final: bool, most: int) -> tuple[ClientData, ...]:
    """The clients with one half of the rows they hold out: the half to choose a rate by, or the one to measure on."""

    def half(client_data: ClientData) -> ClientData:
        return replace(
            client_data,
            heldout_rows=take(client_data.heldout_rows, range(int(final), len(client_data.heldout_rows), 2)[:most]),
        )

    return tuple(half(client_data) for client_data in _setup(place, config_of(place).lora).clients_data)


def run_all(place: Place, chosen: Sequence[Variant], out: Path, jobs: int) -> Results:
    """Do every run that is not in the file, `jobs` at a time; the file is written after each."""
    return sweep(partial(ready, chosen), partial(measure, place), _said, (out, _settings(place)), jobs)


def load(out: Path, place: Place) -> Results:
    """The results in the file, without the runs that failed. Raises `ConfigError` for results of other settings."""
    return kept.load(out, _settings(place))


def save(out: Path, place: Place, results: Results) -> None:
    """Write the results; the file is whole at any moment."""
    kept.save(out, _settings(place), results)


def _settings(place: Place) -> dict[str, Any]:
    """The settings that all results of a file have in common, whatever the paths of model and data."""
    rounds = {"rounds of the grid": SHORT, "rounds": LONG, "own": OWN}
    return {**configuration.read(TOML), **SETTINGS, **rounds, **(SMOKE if place.smoke else {})}


def _said(run: GridRun, done: Mapping[str, Any]) -> str:
    return f"{run.variant.name} at {run.lr:g}, {'measured' if run.final else 'tried'}: {outcome(done)}"


def outcome(done: Mapping[str, Any]) -> str:
    """A run's error, or how good the clients' models are, in one line."""
    if "error" in done:
        return str(done["error"])
    return "clients' own loss {loss:.4f}, accuracy {mean:.4f}".format(**done["own"]) + f" in {done['seconds']:.0f} s"


HEAD = ("strategy", "rate", "val, last round", "val, best round", "clients' own", "distance", "up", "down", "seconds")


def table(chosen: Sequence[Variant], results: Results) -> str:
    """The measured runs in Markdown; a rate at an end of its grid has a star, for a better one may lie beyond."""
    rows = [_row(variant, results.get(variant.name, {}).get("final", {"error": "not run"})) for variant in chosen]
    return markdown(HEAD, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def starred(value: float, grid: Sequence[float]) -> str:
    """The value, with a star at an end of its grid."""
    return f"{value:g}{'*' if value in (min(grid), max(grid)) else ''}"


def percent(share: float) -> str:
    """A share in percent, with one digit after the point."""
    return f"{100 * share:.1f}"


def _row(variant: Variant, done: Mapping[str, Any]) -> tuple[str, ...]:
    if "error" in done:
        return (variant.name, done["error"], *[""] * (len(HEAD) - 2))
    distance = done["rounds"][-1].get("exactness")
    return (
        variant.name,
        starred(done["lr"], variant.rates),
        *(("", "") if done["personal"] else _accuracies(done["rounds"])),
        percent(done["own"]["mean"]),
        "" if distance is None else f"{distance:.1e}",
        _traffic(done["rounds"], "bytes_up"),
        _traffic(done["rounds"], "bytes_down"),
        f"{done['seconds']:.0f}",
    )


def _accuracies(rounds: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The accuracy after the last round, and that of the best round with its number."""
    accuracy = [record["eval"]["accuracy"] for record in rounds]
    best = max(accuracy)
    return percent(accuracy[-1]), f"{percent(best)} ({accuracy.index(best) + 1})"


def _traffic(rounds: Sequence[Mapping[str, Any]], key: str) -> str:
    """Bytes of a round, on the average of all but the first, in which clients are sent what stays the same."""
    return size(round(fmean(record[key] for record in rounds[1:] or rounds)))


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
    """The command line's place, names of wanted lines, file of results, and number of processes."""
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
